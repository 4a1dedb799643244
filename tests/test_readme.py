"""The README's examples run, and its commands are those of CI."""

import fnmatch
import importlib
import inspect
import re
from pathlib import Path

import pytest

import bnstats

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


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "README.md"], ids=str)
def test_the_tables_are_what_the_results_say(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    readme = importlib.import_module("benchmarks.readme")
    text = page.read_text()
    tables = readme.tables(ROOT / "benchmarks" / "results" / "cpu", text)
    assert tables
    assert set(re.findall(r"<!-- (\w+): begin -->", text)) == tables.keys()
    for name, table in tables.items():
        begin, end = readme.marks(name)
        assert text.split(begin)[1].split(end)[0].strip() == table.strip(), name


def test_every_public_name_and_option_is_listed_with_a_link_to_its_docstring():
    rows = README.split("## Every public name")[1].split("\n## ")[0].splitlines()
    listed = {}
    for row in rows:
        if found := re.match(r"\| \[(.*?)\]\((.*?)\) \| (.*?) \| ", row):
            names, path, options = found.groups()
            assert (ROOT / path).is_file(), path
            base, *dims = re.findall(r"`(\w+)`", names)
            for name in [base, *(re.sub("1d$", "", base) + dim for dim in dims)]:
                listed[name] = (ROOT / path, options)
    assert listed.keys() == set(bnstats.__all__)
    for name, (path, options) in listed.items():
        value = getattr(bnstats, name)
        assert name.rstrip("123d") in path.read_text(), f"{name} is not in {path}"
        if not isinstance(value, type):
            for option in inspect.signature(value).parameters.values():
                assert f"`{option.name}" in options, f"{name}: {option.name}"


def test_links_lead_to_files_that_are_there():
    for link in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_what_is_promised_is_shown_by_tests_that_are_there():
    section = README.split("## What is promised")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")][2:]
    files = {path.stem: path for folder in ("tests", "benchmarks") for path in _python(folder)}
    functions = re.findall(r"def (test_\w+)", "".join(p.read_text() for p in files.values()))
    assert len(rows) > 15
    for row in rows:
        promise, *shown = (cell.strip() for cell in row.strip("|").split(" | "))
        names = re.findall(r"`((?:test|bench)_[\w*]+|\w+_layers)`", " ".join(shown))
        assert names, f"nothing shows: {promise}"
        for name in names:
            there = fnmatch.filter([*files, *functions], name)
            assert there, f"{promise}: there is no {name}"


def _python(folder):
    return (ROOT / folder).glob("*.py")
