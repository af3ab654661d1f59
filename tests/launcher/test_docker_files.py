"""What the images are made of agrees with the package."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_control_image_installs_a_part_of_the_packages_dependencies() -> None:
    lines = (ROOT / "docker" / "requirements-control.txt").read_text().splitlines()
    wanted = {line for line in lines if line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wanted <= set(project["dependencies"])
    assert not any(line.startswith(("torch", "transformers")) for line in wanted)
