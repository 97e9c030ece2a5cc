"""The scripts of launch/: the environment's stamp, quickstart's flow.

The scripts are the real ones, run by bash in a copy of the checkout whose path holds a space. So
that this takes no network and no minute, the copy's environment gets a pip that only notes what it
is asked for. The slow test at the end installs and trains for real.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cases.pins import pin_of

ROOT = Path(__file__).resolve().parents[1]

# Stands in for pip. Notes its arguments; fails, waits or "installs" as the environment says.
FAKE_PIP = """
import os, sys, time
from pathlib import Path
arguments = " ".join(sys.argv[1:])
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    log.write(arguments + "\\n")
if os.environ.get("FAKE_PIP_FAIL", "\\0") in arguments:
    sys.exit("fake pip: no such package")
time.sleep(float(os.environ.get("FAKE_PIP_SLEEP_S", 0)))
script = Path(sys.prefix, "bin", "est-ds")
script.write_text(os.environ.get("FAKE_EST_DS", "#!/bin/sh\\n"))
script.chmod(0o755)
"""

# Stands in for `python -m data_prep`: writes the manifest last, and verifies that it is there.
FAKE_DATA_PREP = """
import sys
from pathlib import Path
verb, out = sys.argv[1], Path(sys.argv[sys.argv.index("--out") + 1])
out.parent.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as calls:
    calls.write("data_prep " + verb + "\\n")
manifest = out.with_name(out.name + ".manifest.json")
if verb == "pack":
    manifest.write_text("{}")
sys.exit(verb == "verify" and manifest.read_text() != "{}")
"""

FAKE_EST_DS = """#!/bin/sh
echo "est-ds $*" >>calls.txt
case $1 in train) mkdir -p runs/quickstart; exit ${FAKE_TRAIN_CODE:-0} ;; esac
"""


class Checkout:
    """A copy of the checkout's scripts in which installs are only noted."""

    def __init__(self, folder):
        self.root = folder / "a path" / "check out"
        self.venv = self.root / ".venv"
        self.log = folder / "pip.log"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "setup.py", self.root)
        (self.root / "data_prep").mkdir()
        (self.root / "data_prep" / "__main__.py").write_text(FAKE_DATA_PREP)

        site = folder / "site"
        (site / "pip").mkdir(parents=True)
        (site / "pip" / "__main__.py").write_text(FAKE_PIP)
        (site / "torch.py").write_text("class version:\n    cuda = None\n")
        for name in "deepspeed", "est_ds", "transformers":
            (site / f"{name}.py").write_text("")

        tools = folder / "tools"
        tools.mkdir()
        self.python = tools / "a python"
        self.python.write_text(
            f'#!/bin/sh\n[ "$1 $2" = "-m venv" ] || exec "{sys.executable}" "$@"\n'
            f'"{sys.executable}" -m venv --without-pip "$3" || exit 1\n'
            f'cp -r "{site}/." "$3"/lib/python*/site-packages/\n'
        )
        (tools / "nvidia-smi").write_text("#!/bin/sh\nexit ${FAKE_NO_GPU:-1}\n")
        for tool in tools.iterdir():
            tool.chmod(0o755)

        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.environ.pop("EST_DS_TORCH_INDEX", None)
        self.environ.update(
            PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
            PYTHON=str(self.python),
            FAKE_PIP_LOG=str(self.log),
            FAKE_EST_DS=FAKE_EST_DS,
        )

    def popen(self, script, *arguments, **environ):
        """Starts a script from another folder, without a terminal and with stdin closed."""
        command = 'exec "$0" "$@" <&-'
        return subprocess.Popen(
            ["bash", "-c", command, self.root / "launch" / script, *arguments],
            cwd=self.elsewhere,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script, *arguments, **environ):
        process = self.popen(script, *arguments, **environ)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def make_env(self, **environ):
        """Sources env.sh as the scripts do."""
        script = self.root / "launch" / "source.sh"
        script.write_text(
            '#!/usr/bin/env bash\nset -euo pipefail\n. "$(dirname -- "$0")/env.sh"\n'
            'echo "active: $(command -v python)"\n'
        )
        script.chmod(0o755)
        return self.run("source.sh", **environ)

    def pip_calls(self):
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return calls


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# The scripts' own input


@pytest.mark.parametrize("script", [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"])
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--step", "6"],
        ["--steps"],
        ["--steps", "0"],
        ["--steps", "-3"],
        ["--steps=many"],
        ["--steps", "1e3"],
        ["--processes", ""],
        ["--processes=2.5"],
        ["configs/run/quickstart.yaml"],
    ],
)
def test_quickstart_rejects_wrong_arguments_before_it_does_anything(checkout, arguments):
    result = checkout.run("quickstart.sh", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("quickstart: error: ") and result.stderr.count("\n") == 1
    assert not checkout.venv.exists()


def test_quickstart_help_says_every_flag_and_installs_nothing(checkout):
    result = checkout.run("quickstart.sh", "--help")
    assert result.returncode == 0
    for flag in "--steps N", "--processes N", "--fresh":
        assert flag in result.stdout
    assert not checkout.venv.exists()


# The environment


def test_environment_is_made_once_in_the_order_that_deepspeed_needs(checkout):
    first = checkout.make_env()
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == f"active: {checkout.venv}/bin/python"
    calls = checkout.pip_calls()
    names = [call.rpartition(" ")[2] for call in calls]
    assert names == [
        pin_of("setuptools"),
        pin_of("torch") + "+cpu",
        pin_of("deepspeed"),
        ".[test,s3]",
    ]
    assert "--no-build-isolation" in calls[2] and "--no-build-isolation" in calls[3]

    took_s = []
    for _ in range(3):
        started = time.monotonic()
        again = checkout.make_env()
        took_s.append(time.monotonic() - started)
        assert again.returncode == 0
        assert again.stdout == f"active: {checkout.venv}/bin/python\n"
    assert checkout.pip_calls() == []
    assert min(took_s) < 1


def test_changed_pin_installs_again_into_the_same_environment(checkout):
    checkout.make_env()
    checkout.pip_calls()
    (checkout.venv / "kept").touch()
    with (checkout.root / "launch" / "requirements.txt").open("a") as pins:
        pins.write("humanize==4.13.0\n")
    assert checkout.make_env().returncode == 0
    assert checkout.pip_calls() and (checkout.venv / "kept").exists()
    assert checkout.make_env().returncode == 0
    assert checkout.pip_calls() == []


def test_interrupted_install_is_not_believed(checkout):
    process = checkout.popen("quickstart.sh", FAKE_PIP_SLEEP_S="60")
    while not checkout.log.exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (checkout.venv / "torn").touch()
    checkout.pip_calls()

    result = checkout.make_env()
    assert result.returncode == 0, result.stderr
    assert "interrupted" in result.stdout
    assert len(checkout.pip_calls()) == 4
    assert not (checkout.venv / "torn").exists()


def test_ctrl_c_leaves_an_environment_that_is_not_believed(checkout):
    process = checkout.popen("quickstart.sh", FAKE_PIP_SLEEP_S="60")
    while not checkout.log.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert not (checkout.venv / "est_ds.stamp").exists()
    checkout.pip_calls()
    assert checkout.make_env().returncode == 0
    assert len(checkout.pip_calls()) == 4


def test_failed_install_shows_the_end_of_the_log_and_a_later_start_goes_on(checkout):
    failed = checkout.make_env(FAKE_PIP_FAIL="deepspeed")
    assert failed.returncode == 1
    assert "fake pip: no such package" in failed.stderr
    assert "env: error: the install failed" in failed.stderr
    assert "active" not in failed.stdout
    (checkout.venv / "kept").touch()
    assert checkout.make_env().returncode == 0
    assert (checkout.venv / "kept").exists()


def test_two_starts_at_once_install_once(checkout):
    checkout.make_env()
    (checkout.venv / "est_ds.stamp").unlink()
    checkout.pip_calls()
    starts = [checkout.popen("source.sh", FAKE_PIP_SLEEP_S="0.3") for _ in range(2)]
    outputs = [start.communicate(timeout=60)[0] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert len(checkout.pip_calls()) == 4
    assert sum("another start is installing" in output for output in outputs) == 1


def test_environment_moved_with_its_checkout_is_made_anew(checkout):
    checkout.make_env()
    checkout.pip_calls()
    (checkout.venv / "stale").touch()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    checkout.venv = checkout.root / ".venv"
    assert checkout.make_env().returncode == 0
    assert len(checkout.pip_calls()) == 4 and not (checkout.venv / "stale").exists()


def test_foreign_environment_that_does_not_start_is_not_removed(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    result = checkout.make_env()
    assert result.returncode == 1
    assert "move it away" in result.stderr
    assert (checkout.venv / "bin").exists()


def test_python_that_is_missing_or_other_than_the_environments_is_one_clear_error(checkout):
    missing = checkout.make_env(PYTHON="/nowhere/python3")
    assert missing.returncode == 1
    assert missing.stderr.startswith("env: error: PYTHON=/nowhere/python3 is not a Python 3.10")
    assert not checkout.venv.exists()

    checkout.make_env()
    other = checkout.python.with_name("other python")
    other.write_text("#!/bin/sh\necho 3.99\n")
    other.chmod(0o755)
    result = checkout.make_env(PYTHON=str(other))
    assert result.returncode == 1
    assert "is Python 3.99, but .venv holds Python" in result.stderr


def test_python_without_venv_says_what_to_install(checkout):
    bare = checkout.python.with_name("bare python")
    bare.write_text(
        f'#!/bin/sh\ncase $* in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n'
    )
    bare.chmod(0o755)
    result = checkout.make_env(PYTHON=str(bare))
    assert result.returncode == 1
    assert "lacks the venv module" in result.stderr and "python3-venv" in result.stderr


def torch_calls(checkout):
    return [call for call in checkout.pip_calls() if pin_of("torch") in call]


def test_torch_is_the_default_build_with_a_gpu_or_where_no_cpu_build_is_offered(checkout):
    result = checkout.make_env(FAKE_NO_GPU="0")
    assert torch_calls(checkout) == [f"install {pin_of('torch')}"]
    assert "holds the CPU build" not in result.stderr
    with_gpu_later = checkout.make_env(FAKE_NO_GPU="0")
    assert "holds the CPU build" in with_gpu_later.stderr

    shutil.rmtree(checkout.venv)
    assert checkout.make_env(FAKE_PIP_FAIL="cpu").returncode == 0
    calls = torch_calls(checkout)
    assert len(calls) == 3 and "whl/cpu" in calls[1]
    assert calls[2] == f"install {pin_of('torch')}"


def test_torch_index_is_used_alone_and_its_failure_is_final(checkout):
    index = "https://index.invalid/simple"
    failed = checkout.make_env(EST_DS_TORCH_INDEX=index, FAKE_PIP_FAIL="index.invalid")
    assert failed.returncode == 1
    assert torch_calls(checkout) == [f"install --index-url {index} {pin_of('torch')}"]
    assert checkout.make_env(EST_DS_TORCH_INDEX=index).stderr == ""
    assert "EST_DS_TORCH_INDEX" in checkout.make_env(EST_DS_TORCH_INDEX="https://other").stderr


# The quickstart


def quickstart_calls(checkout):
    calls = (checkout.root / "calls.txt").read_text().splitlines()
    (checkout.root / "calls.txt").unlink()
    return calls


def test_quickstart_prepares_trains_and_reports_and_later_does_only_what_is_left(checkout):
    first = checkout.run("quickstart.sh", "--steps", "6", "--processes=2")
    assert first.returncode == 0, first.stderr
    train = "est-ds train configs/run/quickstart.yaml run_dir=runs/quickstart"
    assert quickstart_calls(checkout) == [
        *(f"data_prep {verb}" for verb in "corpus tokenizer pack pack verify verify".split()),
        f"{train} steps=6 --processes 2",
        "est-ds report runs/quickstart",
    ]
    report = checkout.root / "runs" / "quickstart" / "report.html"
    assert first.stdout.splitlines()[-1] == f"quickstart: the report is {report}"

    assert checkout.run("quickstart.sh").returncode == 0
    assert quickstart_calls(checkout) == [
        "data_prep verify",
        "data_prep verify",
        train,
        "est-ds report runs/quickstart",
    ]

    (checkout.root / "data" / "stdlib" / "valid.manifest.json").write_text("torn")
    assert checkout.run("quickstart.sh").returncode == 0
    assert "data_prep corpus" in quickstart_calls(checkout)


def test_quickstart_fresh_keeps_every_former_run(checkout):
    for number in range(3):
        assert checkout.run("quickstart.sh", "--fresh").returncode == 0
        (checkout.root / "runs" / "quickstart" / f"run-{number}").touch()
    found = sorted(str(p.relative_to(checkout.root)) for p in checkout.root.glob("runs/*/run-*"))
    assert found == [
        "runs/quickstart.old-1/run-0",
        "runs/quickstart.old-2/run-1",
        "runs/quickstart/run-2",
    ]


def test_quickstart_passes_on_a_failure_and_points_to_fresh_where_a_run_is_in_the_way(checkout):
    failed = checkout.run("quickstart.sh", FAKE_TRAIN_CODE="1")
    assert failed.returncode == 1 and "--fresh" not in failed.stderr
    refused = checkout.run("quickstart.sh", "--steps", "6", FAKE_TRAIN_CODE="2")
    assert refused.returncode == 2
    assert "launch/quickstart.sh --fresh --steps 6" in refused.stderr
    assert "est-ds report" not in " ".join(quickstart_calls(checkout))


@pytest.mark.slow
def test_fresh_clone_installs_trains_and_reports_then_resumes_without_work(tmp_path):
    clone = tmp_path / "a fresh clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    folders = os.environ["PATH"].split(os.pathsep)
    environ["PATH"] = os.pathsep.join(f for f in folders if f != str(Path(sys.prefix, "bin")))

    def quickstart(*arguments):
        command = ["bash", "-c", 'exec "$0" "$@" <&-', clone / "launch/quickstart.sh", *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=1200,
            start_new_session=True,
        )

    first = quickstart("--steps", "6")
    assert first.returncode == 0, first.stdout + first.stderr
    assert (clone / "runs" / "quickstart" / "report.html").is_file()
    metrics = (clone / "runs" / "quickstart" / "metrics.jsonl").read_text()

    second = quickstart("--steps", "6")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "env: installing" not in second.stdout
    assert (clone / "runs" / "quickstart" / "metrics.jsonl").read_text() == metrics

    other_steps = quickstart("--steps", "12")
    assert other_steps.returncode == 2
    assert "--fresh" in other_steps.stderr
