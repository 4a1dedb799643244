"""The README's examples run, and its commands are those of CI."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_python_block_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_ci_runs_the_readmes_test_command():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    (command,) = [command for command in commands if "pytest" in command]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_tables_are_what_the_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    readme = importlib.import_module("benchmarks.readme")
    marked = set(re.findall(r"<!-- (\w+): begin -->", README))
    tables = readme.tables(ROOT / "benchmarks" / "results" / "cpu", README)
    assert marked == tables.keys() >= {"performance"}
    for name, table in tables.items():
        begin, end = readme.marks(name)
        assert README.split(begin)[1].split(end)[0].strip() == table.strip(), name
