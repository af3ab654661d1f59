"""Sources of the cluster key, weak keys, and that a created key is readable by its user only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.access.cluster_key import (
    ENV_CLUSTER_KEY,
    find_or_make,
    load_cluster_keys,
    make_keys,
    user_key_path,
)
from fastserve.errors import StartupError

OLD, NEW = "an-old-key-of-tests-0123456789-abcdef", "a-new-key-of-tests-0123456789-abcdef"
LOOPBACK = ["localhost", "127.0.0.1", "::1", "[::1]", "127.8.9.1", "a.localhost"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user with an empty home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    yield {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    for folder in tmp_path.rglob("*"):
        if folder.is_dir():
            folder.chmod(0o700)


def load(environ: dict[str, str], *hosts: str, key_file: str | None = None, insecure: bool = False) -> object:
    return load_cluster_keys(environ, key_file=key_file, insecure=insecure, hosts=hosts or ("localhost",))


def test_the_first_key_is_sent_and_all_are_accepted() -> None:
    keys = make_keys([NEW, OLD], "test")
    assert keys.current == NEW
    assert keys.authorization() == {"Authorization": f"Bearer {NEW}"}
    assert keys.owner_of(OLD.encode()) == keys.owner_of(NEW.encode()) is not None
    for wrong in (OLD[:-1], OLD + "x", "", "é", f"{NEW},{OLD}"):
        assert keys.owner_of(wrong.encode()) is None
    assert OLD not in repr(keys)
    assert NEW not in repr(keys)


def test_keys_come_from_environment_or_file_with_owners_in_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\nteam-a {NEW}\n\n{OLD}\n")
    keys = load_cluster_keys({ENV_CLUSTER_KEY: "ignored"}, key_file=str(path), insecure=False, hosts=["0.0.0.0"])
    assert keys is not None
    assert keys.current == NEW
    assert keys.owner_of(NEW.encode()) == "team-a" != keys.owner_of(OLD.encode())
    keys = load_cluster_keys({ENV_CLUSTER_KEY: f" {NEW} , {OLD}"}, key_file=None, insecure=False, hosts=["::"])
    assert keys is not None
    assert keys.current == NEW


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("short", "too easy to guess: 5 characters"),
        ("a" * 40, "fewer than 8 different characters"),
        ("ab" * 20, "different characters"),
        ("x" + 20 * NEW, "longer than 512"),
        ("schlüssel" + NEW, "printable ASCII"),
        (f"two owners {NEW}", "owner's name"),
        ("", "holds no key"),
    ],
)
def test_a_weak_or_malformed_key_is_refused_without_being_repeated(entry: str, words: str) -> None:
    with pytest.raises(StartupError, match=words) as refused:
        make_keys([entry], "FILE")
    assert "secrets.token_urlsafe" in refused.value.message or "owner" in refused.value.message
    assert entry == "" or entry not in refused.value.message


def test_one_key_cannot_have_two_owners() -> None:
    with pytest.raises(StartupError, match="two owners"):
        make_keys([f"a {NEW}", f"b {NEW}"], "FILE")


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.5", "example.com", "fe80::1", "localhost.example.com"]
)
def test_beyond_loopback_no_service_starts_without_a_key_or_insecure(home: dict[str, str], host: str) -> None:
    with pytest.raises(StartupError, match=r"need a cluster key.*--cluster-key-file.*CLUSTER_KEY.*--insecure"):
        load(home, "localhost", host)
    assert not user_key_path(home).exists()
    assert load(home, host, insecure=True) is None
    assert load({ENV_CLUSTER_KEY: NEW}, host) is not None


def test_on_loopback_the_users_key_is_made_once_and_found_again(home: dict[str, str]) -> None:
    first = load(home, *LOOPBACK)
    assert first == load(home) == find_or_make(home)
    path = user_key_path(home)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_services_that_start_side_by_side_find_the_same_key(home: dict[str, str]) -> None:
    code = "import os; from fastserve.access.cluster_key import find_or_make; print(find_or_make(os.environ).current)"
    started = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **home}, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    found = {process.communicate(timeout=60)[0].strip() for process in started}
    assert found == {find_or_make(home).current}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_does_no_harm(home: dict[str, str]) -> None:
    Path(home["HOME"]).chmod(0o500)
    keys = find_or_make(home)
    assert keys == find_or_make(home)
    assert not user_key_path(home).exists()


@pytest.mark.parametrize("kind", ["file in its place", "path too long"])
def test_without_a_usable_home_the_key_lies_in_a_private_temporary_folder(home: dict[str, str], kind: str) -> None:
    environ = home | {"HOME": home["HOME"] + ("/file" if kind == "file in its place" else "/x" * 3000)}
    if kind == "file in its place":
        Path(environ["HOME"]).write_text("")
    keys = find_or_make(environ)
    assert keys == find_or_make(environ)
    [made] = Path(home["TMPDIR"]).rglob("cluster.key")
    assert made.stat().st_mode & 0o777 == 0o600
    assert made.parent.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_home_or_an_entry_has_the_key_there_too(
    home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_entry() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_entry)
    environ = {"TMPDIR": home["TMPDIR"]}
    assert find_or_make(environ) == find_or_make(environ)
    assert user_key_path(environ).is_relative_to(home["TMPDIR"])


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_not_used(home: dict[str, str], mode: int) -> None:
    find_or_make(home)
    user_key_path(home).chmod(mode)
    with pytest.raises(StartupError, match=r"Other users can read .*chmod 600"):
        find_or_make(home)


def test_a_folder_that_others_can_write_into_is_not_used(home: dict[str, str]) -> None:
    find_or_make(home)
    user_key_path(home).parent.chmod(0o777)
    with pytest.raises(StartupError, match=r"Other users can write into .*chmod 700"):
        find_or_make(home)


def test_links_are_not_followed(home: dict[str, str], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(OLD + "\n")
    elsewhere.chmod(0o600)
    path = user_key_path(home)
    path.parent.mkdir(parents=True, mode=0o700)
    path.symlink_to(elsewhere)
    with pytest.raises(StartupError, match="is a link"):
        find_or_make(home)
    path.unlink()
    path.symlink_to(tmp_path / "not-there")
    with pytest.raises(StartupError, match="is a link"):
        find_or_make(home)
    assert not (tmp_path / "not-there").exists()
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(tmp_path)
    with pytest.raises(StartupError, match="is no folder"):
        find_or_make(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_key_of_another_user_is_not_used(home: dict[str, str]) -> None:
    find_or_make(home)
    os.chown(user_key_path(home), 12345, -1)
    with pytest.raises(StartupError, match=r"belongs to another user \(id 12345\)"):
        find_or_make(home)
