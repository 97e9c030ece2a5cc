"""Files that are complete or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from est_ds.errors import UserError


@contextlib.contextmanager
def staged(*targets: Path) -> Iterator[list[Path]]:
    """Temporary paths beside the targets, moved into place when the block succeeds.

    If the block raises, the temporary files are removed and the targets stay as they were.

    Yields:
        One path for each target, to be written by the caller.

    Raises:
        UserError: A target cannot lie where it should.
    """
    for target in targets:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out: cannot make the folder {target.parent} ({error.strerror}); give a path "
                f"that can be written."
            ) from None
        if target.is_dir():
            raise UserError(f"--out: {target} is a folder; give another --out.")
    temporary = [target.with_name(f"{target.name}.tmp{os.getpid()}") for target in targets]
    try:
        yield temporary
        for source, target in zip(temporary, targets, strict=True):
            os.replace(source, target)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)
