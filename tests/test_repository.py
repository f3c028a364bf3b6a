"""The files around the code: versions agree, workflows and templates are valid."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import nonlocal_jax as nl

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
YAML_FILES = sorted((ROOT / ".github").rglob("*.yml"))


def test_versions_agree():
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert {nl.__version__, PROJECT["version"], CITATION["version"], changes[0]} == {changes[0]}


def test_the_citation():
    assert CITATION["license"] == PROJECT["license"]
    assert f"{CITATION['repository-code']}/issues" == PROJECT["urls"]["Issues"]
    assert CITATION["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: file.name)
def test_workflows_and_templates_are_valid(file):
    content = yaml.safe_load(file.read_text())
    match file.parent.name, file.stem:
        case "workflows", _:
            steps = [step for job in content["jobs"].values() for step in job["steps"]]
            assert all(step.keys() & {"run", "uses"} for step in steps)
        case _, "config":
            assert content["contact_links"]
        case _:
            assert content.keys() >= {"name", "description", "body"}
            assert all("label" in part["attributes"] for part in content["body"])


def test_a_release_runs_the_first_example_of_the_readme():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    (script,) = (
        step["run"] for step in workflow["jobs"]["check"]["steps"] if "awk" in step.get("run", "")
    )
    command = script.splitlines()[0].replace("source/README.md > example.py", "README.md")
    example = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert example == snippets[0]
