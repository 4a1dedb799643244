"""What bnstats costs, beside what it replaces; nothing here imports the tests."""
