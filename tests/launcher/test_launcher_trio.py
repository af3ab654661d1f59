"""The launcher with the real services and the fake engine: launch, an answer with an API key, shutdown."""

import ssl
import subprocess
import sys

import openai
import psutil
import pytest
import trustme

from .launching import Sandbox


def test_trio_serves_and_goes(sandbox: Sandbox) -> None:
    items = f"fastserve-demo@localhost@{sandbox.worker_port}?model-names=first,second"
    words = ["--model-path-address", items, "--engine", "fake", "--api-keys", "sk-one,sk-two"]
    result = sandbox.launch_real(*words, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    base_url = f"http://localhost:{sandbox.server_port}/v1"
    assert f"base_url for the OpenAI SDK: {base_url}\n" in result.stdout
    with openai.OpenAI(base_url=base_url, api_key="sk-two", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"first", "second"}
        answer = client.chat.completions.create(
            model="second", messages=[{"role": "user", "content": "What is 7 + 5?"}], max_tokens=8
        )
        assert answer.choices[0].message.content
    with (
        openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    listed = [word for pid in sandbox.services().values() for word in psutil.Process(pid).cmdline()]
    written = [path.read_text() for path in sandbox.logs.iterdir()]
    assert not any("sk-" in text for text in (*listed, *written, result.stdout, result.stderr))

    ended = sandbox.shutdown()
    assert ended.returncode == 0, ended.stderr
    assert "killed" not in ended.stdout
    assert sandbox.strays() == []


def test_real_workers_refusal_ends_the_launch_with_its_sentence(sandbox: Sandbox) -> None:
    model = sandbox.model()
    words = [
        *("--controller-port", str(sandbox.controller_port), "--server-port", str(sandbox.server_port)),
        *("--model-path-address", f"{model}@localhost@{sandbox.worker_port}"),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "fastserve.launcher", *words],
        cwd=sandbox.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    first = result.stderr.splitlines()[0]
    assert first.startswith(f"model_worker {model}@localhost@{sandbox.worker_port} ended with exit code 1: ")
    assert sandbox.strays() == []


@pytest.mark.slow
def test_a_launch_with_tls_and_client_certificates(sandbox: Sandbox) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1", "::1")
    ca, cert, key = (sandbox.folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(ca))
    certificate.private_key_pem.write_to_path(str(key))
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    words = ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-ca", str(ca), "--engine", "fake"]
    item = f"fastserve-demo@localhost@{sandbox.worker_port}"
    result = sandbox.launch_real("--model-path-address", item, *words)
    assert result.returncode == 0, result.stderr
    base_url = f"https://localhost:{sandbox.server_port}/v1"
    assert f"base_url for the OpenAI SDK: {base_url}\n" in result.stdout
    http = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=str(ca)))
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, http_client=http) as client:
        assert [model.id for model in client.models.list()] == ["fastserve-demo"]
    assert sandbox.shutdown().returncode == 0
    assert sandbox.strays() == []
