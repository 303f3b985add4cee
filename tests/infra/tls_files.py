"""An authority, and certificates signed by it, made by the program openssl for one test run."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = "subjectAltName=IP:127.0.0.1"


@dataclass(frozen=True, slots=True)
class Certificate:
    certificate: Path
    key: Path

    def keystore(self) -> Path:
        """Key and certificate in one file, as Kafka takes them."""
        path = self.key.with_suffix(".store.pem")
        path.write_text(self.key.read_text() + self.certificate.read_text())
        return path


class Authority:
    """Signs certificates. Skips the test where there is no openssl."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("the program openssl is needed to make certificates")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.certificate = folder / "authority.pem"
        self._key = folder / "authority.key"
        request = ("-subj", f"/CN={name}", "-addext", "basicConstraints=critical,CA:TRUE", "-days", "2")
        _openssl("req", "-x509", *_new_key(self._key), "-out", self.certificate, *request)

    def certificate_for(self, name: str, alternatives: str = NAMES, password: str = "") -> Certificate:
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request = self._folder / f"{name}.csr"
        _openssl("req", *_new_key(made.key), "-out", request, "-subj", f"/CN={name}")
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(alternatives + "\n")
        signed_by = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-days", "2")
        _openssl("x509", "-req", "-in", request, "-out", made.certificate, *signed_by, "-extfile", extensions)
        if password:
            plain = made.key.rename(made.key.with_suffix(".plain"))
            _openssl("pkcs8", "-topk8", "-in", plain, "-out", made.key, "-passout", f"pass:{password}", "-v2", "aes256")
        return made


def _new_key(path: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
