"""What the processes of `forks` inherit is only what was loaded."""

import os
import sys
from pathlib import Path

from forks import fork, wait


def look() -> None:
    """Asserts, in a forked process, that its server had begun nothing."""
    import torch
    import torch.distributed as dist

    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == len(os.listdir("/proc/self/task")) == 1
    assert not dist.is_initialized() and not torch.cuda.is_initialized()
    assert torch.get_num_threads() == 1
    assert {"deepspeed", "transformers"} <= set(sys.modules)
    print(os.getcwd(), dict(os.environ))
    sys.exit(7)


def test_forked_process_begins_with_modules_and_nothing_else(tmp_path):
    streams = (tmp_path / "out", tmp_path / "err")
    process = fork(look, (), streams, tmp_path, {"ONLY": "this"})
    assert wait([process], 60) == [7], streams[1].read_text()
    assert streams[0].read_text() == f"{tmp_path} {{'ONLY': 'this'}}\n"
    assert Path.cwd() != tmp_path and "ONLY" not in os.environ
