"""Small files that appear whole or not at all, and the digest that says what a file depends on."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def digest(settings: Any) -> str:
    """SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8")).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
