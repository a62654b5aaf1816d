"""Tokens are on, open clusters are refused, secrets stay out of what is printed and written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_scale.errors import ConfigError, UserError
from launch.cli import main
from launch.commands.demo import CHAIN
from launch.security import MODE, TOKEN, authentication, redacted, require_closed, require_no_secrets

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "Kj7planted0secret0value9x"


def test_a_local_ray_gets_a_token_of_its_own() -> None:
    first, second = (authentication({}, local=True, insecure=False) for _ in range(2))
    assert first[MODE] == "token" and len(first[TOKEN]) == 64
    assert first[TOKEN] != second[TOKEN]
    assert authentication({TOKEN: "given"}, local=True, insecure=False) == {MODE: "token"}
    assert TOKEN in authentication({}, local=True, insecure=True)  # there is no reason to do without on one machine


def test_joining_takes_the_users_token() -> None:
    assert authentication({}, local=False, insecure=False) == {MODE: "token"}
    assert authentication({}, local=False, insecure=True) == {MODE: "disabled"}
    assert authentication({MODE: "token"}, local=False, insecure=True) == {MODE: "token"}


def test_tokens_switched_off_are_refused() -> None:
    with pytest.raises(UserError, match="RAY_AUTH_MODE is 'disabled', which lets anyone"):
        authentication({MODE: "disabled"}, local=True, insecure=False)
    assert authentication({MODE: "disabled"}, local=True, insecure=True) == {MODE: "disabled"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:sekret@bucket/shards", "s3://***@bucket/shards"),
        ("https://host/a?X-Amz-Signature=abc123&x=1", "https://host/a?X-Amz-Signature=***&x=1"),
        ("https://host/a?x=1&token=abc: not found", "https://host/a?x=1&token=*** not found"),
        ("mail a@b.org about shards/train", "mail a@b.org about shards/train"),
        ("s3://bucket/key@2/shards", "s3://bucket/key@2/shards"),
        ("https://host/a?monkey=1", "https://host/a?monkey=1"),
    ],
)
def test_credentials_of_addresses_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, PLANTED)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "short")
    assert redacted(f"Bearer {PLANTED} is short") == "Bearer *** is short"


def test_a_configuration_holds_no_secret() -> None:
    require_no_secrets({"stages.a.data.train": "s3://bucket/train", "seed": 3})
    with pytest.raises(ConfigError) as caught:
        require_no_secrets({"stages.a.data.train": f"s3://user:{PLANTED}@bucket/train"})
    assert "stages.a.data.train is 's3://***@bucket/train' and holds a secret" in str(caught.value)


def test_train_neither_prints_nor_writes_a_planted_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_SCALE_DEBUG", "1")  # the traceback as well
    run = tmp_path / "run"
    address = f"https://me:{PLANTED}@127.0.0.1:9/shards?sig={PLANTED}"
    assert main(["train", str(CHAIN), "--run-dir", str(run), "--set", f"stages.pretrain.data.train={address}"]) == 2
    shown = capsys.readouterr()
    assert "holds a secret" in shown.err
    assert PLANTED not in shown.err + shown.out
    assert not run.exists()


def test_an_error_that_carries_a_token_is_printed_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, PLANTED)
    assert main(["report", str(tmp_path / PLANTED)]) == 2
    shown = capsys.readouterr().err
    assert "***" in shown and PLANTED not in shown


HEAD = textwrap.dedent(
    """
    import sys, ray
    info = ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], object_store_memory=80 * 2**20,
                    logging_level="ERROR")
    print(info.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
    """
)


@pytest.fixture(params=["disabled", "token"])
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """(mode, address, folder of logs) of a Ray head in a process of its own."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ds-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {
            MODE: request.param,
            TOKEN: PLANTED,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        command = [sys.executable, "-c", HEAD, folder]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdin and process.stdout
        try:
            yield request.param, process.stdout.readline().strip(), Path(folder)
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def test_an_open_cluster_is_told_from_a_closed_one(
    head: tuple[str, str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    mode, address, folder = head
    assert address.startswith("127.0.0.1:")
    if mode == "token":
        require_closed(address)
        logs = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert logs and not any(PLANTED.encode() in log for log in logs)  # Ray's own logs do not hold the token
        return
    with pytest.raises(UserError, match=f"the Ray cluster at {address} asks for no token"):
        require_closed(address)
    data = [
        f"stages.{name}.data.{key}={tiny_data / 'scenes' / key}"
        for name in ("pretrain", "finetune", "scratch")
        for key in ("train", "validation")
    ]
    settings = [part for setting in (*data, f"launch.address={address}") for part in ("--set", setting)]
    command = [sys.executable, "-m", "launch", "train", str(CHAIN), "--run-dir", str(tmp_path / "run"), *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "asks for no token" in done.stderr and "--insecure" in done.stderr


@pytest.mark.slow  # Ray waits long for a head that is not there
def test_what_does_not_answer_is_not_taken_for_closed() -> None:
    with pytest.raises(UserError, match="could not be found out"):
        require_closed("127.0.0.1:1")
