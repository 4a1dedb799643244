"""A second device for machines without one."""
