"""How a dataset's place may be written: home and variables, passwords, commands on URLs."""

import base64
from pathlib import Path

import pytest

from data.config import expanded, shown
from data.dataset import Shards, open_shards
from data.exits import REFUSED
from data.pack import main as pack_main
from data.shards import main
from tests.support.data_server import serving


def test_home_and_variables_are_expanded(whole: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(whole.root)
    monkeypatch.setenv("HOME", str(place.parent))
    monkeypatch.setenv("PLACE", str(place.parent))
    for root in (f"~/{place.name}", f"$PLACE/{place.name}", f"${{PLACE}}/{place.name}"):
        assert open_shards(root).root == whole.root
    with pytest.raises(ValueError, match=r"data\.shards = \$NOWHERE/x: .* are not set"):
        open_shards("$NOWHERE/x")
    for root in ("pipe:cat $PLACE/{name}", "s3://$PLACE"):
        assert expanded(root, name="data.shards") == root


@pytest.mark.parametrize(
    ("root", "wanted"),
    [
        ("https://me:pw@host/set", "https://***@host/set"),
        ("ftp://me@host/set", "ftp://***@host/set"),
        ("http://me:p@ss@host/set", "http://***@host/set"),
        ("http://me:p/w@host/set", "http://***@host/set"),
        ("http://host:8000/a@b", "http://host:8000/a@b"),
        ("https://host/set?X-Amz-Signature=ab&x=1", "https://host/set?X-Amz-Signature=***&x=1"),
        (
            "pipe:curl -H 'Authorization: Bearer ab.c' https://h/{name}",
            "pipe:curl -H 'Authorization: Bearer ***' https://h/{name}",
        ),
        ("pipe:TOKEN=abc get {name}", "pipe:TOKEN=*** get {name}"),
        ("https://host/set?s3cr+et/x=", "https://host/set?***"),
        ("https://host/set?part=2&s3cret&x=1", "https://host/set?part=2&***&x=1"),
        ("https://host/set?KEY=s3cret&part=2", "https://host/set?KEY=***&part=2"),
        ("pipe:curl 'https://h/{name}?s3cret' | cat", "pipe:curl 'https://h/{name}?***' | cat"),
        ("no dataset at https://h/s?s3cret: see it", "no dataset at https://h/s?***: see it"),
        ("https://host/a?", "https://host/a?"),
        ("https://host/set?part=2&sig=a1b2", "https://host/set?part=2&sig=***"),
        ("pipe:curl -u me:pa55 https://h/{name}", "pipe:curl -u me:*** https://h/{name}"),
        (
            "pipe:AWS_SECRET_ACCESS_KEY=x1 aws s3 cp {name} -",
            "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp {name} -",
        ),
        ("pipe:ssh store cat {name}", "pipe:ssh store cat {name}"),
        ("/data/token/secret-garden/set", "/data/token/secret-garden/set"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_secrets_and_nothing_else_are_not_shown(root: str, wanted: str) -> None:
    assert shown(root) == wanted


def test_a_password_is_sent_and_never_printed(
    whole: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    with serving(Path(whole.root), seen=seen) as url:
        secret = url.replace("://", "://me:se%20cret@")
        assert main(["verify", secret, "--full"]) == 0
        assert main(["info", secret]) == 0
        assert main(["info", f"{secret}/nothing"]) == REFUSED
        text = "".join(capsys.readouterr())
    login = base64.b64encode(b"me:se cret").decode()
    assert {headers["Authorization"] for headers in seen} == {f"Basic {login}"}
    assert "60 images 16 x 16" in text and "no dataset at http://***@127" in text
    assert "cret" not in text


def test_a_signature_stays_behind_the_names_of_files(
    whole: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gr\u00f6\u00dfe x").symlink_to(whole.root)
    query = "sv=1&sig=s3cr%2Bt"
    with serving(tmp_path, query=query) as url:
        assert main(["verify", f"{url}/gr\u00f6\u00dfe x/?{query}", "--full"]) == 0
        words = [whole.root, str(tmp_path / "o"), "--size", "8", "--workers", "1"]
        assert pack_main([*words, "--classes-of", f"{url}/gr%C3%B6\u00dfe x?{query}"]) == 0
        for wrong in (f"{url}/nothing?{query}", f"{url}/nothing?sig=s3cr"):
            assert main(["info", wrong]) == REFUSED
            text = capsys.readouterr().err
            assert f"{url}/nothing" in text and "s3cr" not in text


@pytest.mark.parametrize(
    "root", ["http://me:s3cr/t@h", "https://h:99999/x", "http://[::1/x", "http:///x"]
)
def test_what_is_no_url_is_refused_at_once(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", root]) == REFUSED
    text = capsys.readouterr().err
    assert "must be http(s)://HOST/..., with %2F" in text and "s3cr" not in text


def test_commands_say_what_a_remote_dataset_lacks(
    whole: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Path(whole.root)) as url:
        assert main(["info", url]) == 0
        assert main(["info", f"{url}/no"]) == REFUSED
        assert main(["merge", "/nowhere/out", url, whole.root]) == REFUSED
    assert main(["verify", "nosuch://bucket/set"]) == REFUSED
    text = capsys.readouterr().err
    assert f"no dataset at {url}/no" in text and "nosuch" in text
    assert f"{url} is no directory" in text
