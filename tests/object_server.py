"""An S3-compatible server on this machine, for tests."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pyarrow import fs

KEY, SECRET = "testing", "only-for-this-test"


class Server:
    """SeaweedFS with an S3 gateway; what was stored survives its death."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = [_free_port() for _ in range(4)]
        credentials = {"credentials": [{"accessKey": KEY, "secretKey": SECRET}], "name": "test", "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [credentials]}))
        (folder / "data").mkdir()
        self.start()

    def start(self) -> None:
        master, volume, filer, s3 = self.ports
        binary = Path(sys.executable).with_name("weed")
        command = [binary, "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [
            f"-master.port={master}",
            f"-volume.port={volume}",
            "-volume.max=20",
            "-master.volumeSizeLimitMB=64",
        ]
        # The only master of a restarted server would wait ten seconds for others.
        command += ["-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms"]
        # Its catalogues have fixed ports, which would keep a second server on the machine from starting.
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={self.folder / 's3.json'}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([str(part) for part in command], cwd=self.folder, **quiet)
        self.wait()

    def wait(self) -> None:
        until = time.monotonic() + 60
        # Asked before it listens, Arrow would try again for six seconds.
        while not _listens(self.ports[3]) and time.monotonic() < until:
            time.sleep(0.05)
        while True:
            try:
                filesystem, path = fs.FileSystem.from_uri(self.uri("ready"))
                filesystem.create_dir("test")
                with filesystem.open_output_stream(path + "/x") as stream:
                    stream.write(b"x")
                return
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.3)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def uri(self, run: str) -> str:
        options = f"endpoint_override=127.0.0.1:{self.ports[3]}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        return f"s3://{KEY}:{SECRET}@test/{run}?{options}"


def _listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        # SeaweedFS also takes port + 10000 for its own protocol.
        port = int(free.getsockname()[1])
    return port if port < 50000 else _free_port()
