"""What is started where: hostfiles, the environment that travels, and the scripts of launch/."""

from __future__ import annotations

import os
import shutil
import subprocess
from argparse import Namespace

import pytest
import yaml

from conftest import ROOT, est_ds
from est_ds.config.run_file import load_run
from est_ds.errors import UserError
from est_ds.launch import hosts
from est_ds.launch.placement import Launch, where_to

# Started by DeepSpeed's launcher of a node in place of est-ds.
SHOWS_ITSELF = """\
import os
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"
os.write(1, " ".join(map(os.environ.get, names)).encode() + b"\\n")
"""
NOTHING = dict(hostfile=None, nodes=None, node_rank=None, master=None, processes=None)


def where(tiny_run, tmp_path, **given):
    config = load_run(tiny_run, [f"run_dir={tmp_path}/run"])
    return where_to(config, Namespace(**(NOTHING | given)))


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "cannot be read"),
        ("", "names no host"),
        ("# node0 slots=2\n", "names no host"),
        ("node0\n", "line 1: 'node0' is not `HOST slots=N`"),
        ("node0 slots=2\nnode1 slots=0\n", "line 2"),
        ("node0 slots=2 # ours\nnode1 slots= 2\n", "line 2"),
        ("node0 slots=2\n\nnode0 slots=2\n", "line 3: node0 stands twice"),
    ],
)
def test_wrong_hostfile_is_one_clear_error_before_anything_starts(text, said, tiny_run, tmp_path):
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match="--hostfile.*" + said.replace("(", r"\(")):
        where(tiny_run, tmp_path, hostfile=str(file))


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(nodes=2), "--node-rank"),
        (dict(nodes=2, node_rank=2, master="a"), "use 0 to 1"),
        (dict(nodes=3, node_rank=0, master="a"), "do not divide"),
        (dict(nodes=2, node_rank=0, master="a:many"), "HOST:PORT"),
        (dict(node_rank=1), "needs --nodes"),
        (dict(hostfile="f", processes=2), "--processes with --hostfile"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, said, tiny_run, tmp_path):
    with pytest.raises(UserError, match=said):
        where(tiny_run, tmp_path, **given)


def test_a_node_takes_its_share_of_the_processes(tiny_run, tmp_path):
    started = where(tiny_run, tmp_path, nodes=2, node_rank=1, master="10.0.0.1")
    assert started.slots == {"node-0": 2, "node-1": 2}
    assert started.master == ("10.0.0.1", 29500) and not started.is_first
    assert where(tiny_run, tmp_path).is_first


def test_environment_that_travels_survives_a_shell_and_holds_no_secret(tmp_path):
    users = tmp_path / "mine"
    users.write_text("# a comment\n\nexport NCCL_DEBUG=INFO\nMY_VALUE=a b\n")
    value = 'a "b" $HOME `id` \\ c\'d'
    environment = {
        "HF_HOME": value,
        "WANDB_API_KEY": "secret",
        "HOME": "/home/x",
        "OMP_NUM_THREADS": "3",
        "EST_DS_STARTER": "7",
        "NCCL_DEBUG": "WARN",
    }
    file = tmp_path / "env"
    hosts.write_environment(file, environment, [users, tmp_path / "none"])

    # As DeepSpeed reads it and puts it on the remote command line.
    from deepspeed.launcher.multinode_runner import MultiNodeRunner

    class Runner(MultiNodeRunner):
        def __init__(self):
            self.exports = {}

        def backend_exists(self):
            return True

        def get_cmd(self, environment, active_resources):
            return []

    runner = Runner()
    for line in file.read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {k}={v}; " for k, v in runner.exports.items())
    names = ("HF_HOME", "OMP_NUM_THREADS", "NCCL_DEBUG", "MY_VALUE")
    shown = subprocess.run(
        ["sh", "-c", exports + " ".join(["printf '%s|'", *(f'"${name}"' for name in names)])],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert shown.stdout == f"{value}|3|INFO|a b|"
    assert "secret" not in file.read_text() and "STARTER" not in file.read_text()


def test_what_travels_goes_by_values_too(tmp_path):
    (tmp_path / "keys.json").write_text("{}")
    public = {
        "FSSPEC_GS": '{"project": "mine"}',
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "keys.json"),
        "MLFLOW_EXPERIMENT_NAME": "mine",
        "MLFLOW_TRACKING_URI": "https://host:5000",
        "PATH": "/opt//python@3/bin:/bin",
        "TOKENIZERS_PARALLELISM": "false",
        "TRACKIO_SPACE_ID": "me/space",
    }
    assert hosts.travelling(public) == public
    secret = {
        "FSSPEC_S3": '{"key": "a", "secret": "b"}',
        "GOOGLE_CREDENTIALS": '{"private_id": "a"}',
        "MLFLOW_TRACKING_PASSWORD": "a",
        "MLFLOW_TRACKING_URI": "https://me:a@host:5000",
        "https_proxy": "http://me:a@host",
    }
    assert hosts.travelling(secret) == {}


@pytest.mark.parametrize(
    "argument", ["batch={global: 8, micro: 2}", "a=$HOME;b", "a=[0,*]", "x='y z'"]
)
def test_argument_survives_pdsh_and_the_remote_shell(argument):
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.args = Namespace(user_args=[hosts.through_ssh(argument)])
    [word] = runner.parse_user_args()
    shown = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, text=True)
    assert shown.stdout == argument


def test_missing_hostfile_starts_nothing(tiny_run, tmp_path):
    done = est_ds("train", tiny_run, f"run_dir={tmp_path}/run", "--hostfile", tmp_path / "none")
    assert done.returncode == 2 and "cannot be read" in done.stderr
    assert not (tmp_path / "run").exists()


# Scripts


def script(tmp_path, *command, **environment):
    """Runs a script of launch/ with tools on PATH that only note how they are called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("est-ds", "scontrol", "srun", "scancel"):
        (tools / name).write_text(
            f'#!/bin/sh\necho "{name} $*" >>"{tmp_path}/calls"\n'
            'case "$0 $*" in\n'
            '*scontrol*hostnames*) printf "node3\\nnode4\\n" ;;\n'
            '*srun*) shift; SLURM_NODEID=1 SLURM_JOB_NUM_NODES=2 "$@" ;;\n'
            "*est-ds*) exit ${FAKE_CODE:-0} ;;\n"
            "esac\n"
        )
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *map(str, command)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "PATH": path, **environment},
    )
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    "environment",
    [
        dict(NODE_RANK="1", NNODES="2"),
        dict(SLURM_NODEID="1", SLURM_JOB_NUM_NODES="2"),
        dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2"),
        dict(JOB_COMPLETION_INDEX="1", NNODES="2"),
    ],
)
def test_node_script_knows_who_it_is(environment, tmp_path):
    done, calls = script(
        tmp_path, "launch/node.sh", "run.yaml", "steps=3", MASTER_ADDR="a", **environment
    )
    assert done.returncode == 0, done.stderr
    assert calls == ["est-ds train run.yaml steps=3 --nodes 2 --node-rank 1 --master a:29500"]


def test_node_script_says_what_is_missing(tmp_path):
    done, calls = script(tmp_path, "launch/node.sh", "run.yaml", NNODES="2", MASTER_ADDR="a")
    assert done.returncode == 2 and "set NODE_RANK" in done.stderr and not calls


@pytest.mark.parametrize("code", ["0", "1", "75"])
def test_slurm_script_starts_every_node_and_queues_itself_again_when_pre_empted(code, tmp_path):
    done, calls = script(
        tmp_path,
        "launch/slurm.sbatch",
        "run.yaml",
        "steps=3",
        FAKE_CODE=code,
        SLURM_JOB_ID="42",
        SLURM_JOB_NODELIST="node[3-4]",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    assert done.returncode == int(code), done.stderr
    assert "est-ds train run.yaml steps=3 --nodes 2 --node-rank 1 --master node3:20042" in calls
    assert ("scontrol requeue 42" in calls) == (code == "75")


def test_skypilot_task_starts_every_node(tmp_path):
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    volume, checkout = tmp_path / "volume", tmp_path / "checkout"
    volume.mkdir()
    (checkout / "launch").mkdir(parents=True)
    (checkout / "launch" / "env.sh").write_text(":\n")
    shutil.copy(ROOT / "launch" / "node.sh", checkout / "launch")
    text = task["run"].replace("/mnt/est_ds", str(volume))
    done, calls = script(
        tmp_path,
        "-c",
        f"cd {checkout}; {text}",
        SKYPILOT_NODE_RANK="1",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8\n",
        RUN="run.yaml",
    )
    assert done.returncode == 0, done.stderr
    assert calls == ["est-ds train run.yaml --nodes 2 --node-rank 1 --master 10.0.0.7:29500"]
    for name in ("data", "runs"):
        assert (checkout / name).resolve() == volume / name and (volume / name).is_dir()


def test_skypilot_task_fits_its_schema():
    schemas = pytest.importorskip("sky.utils.schemas", reason="needs skypilot")
    import jsonschema

    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    jsonschema.Draft7Validator(schemas.get_task_schema()).validate(task)
    jsonschema.Draft7Validator(schemas.get_resources_schema()).validate(task["resources"])


# Containers and manifests


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint (extra `lint`)")
def test_dockerfile_passes_its_linter():
    file = ROOT / "docker" / "Dockerfile"
    done = subprocess.run(["hadolint", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("kubernetes-validate"), reason="needs the extra `lint`")
def test_manifests_fit_the_schemas_of_kubernetes():
    file = ROOT / "launch" / "kubernetes.yaml"
    done = subprocess.run(["kubernetes-validate", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_manifest_and_compose_file_agree_with_the_image():
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    documents = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
    job = next(d for d in documents if d["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert f"USER {pod['securityContext']['runAsUser']}\n" in dockerfile
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    trained = [compose["services"][name] for name in ("node0", "node1")]
    commands = [container["command"] + container["args"]]
    commands += [service["entrypoint"] + service["command"] for service in trained]
    for command in commands:
        for word in command:
            if word.startswith("/opt/est_ds/"):
                assert (ROOT / word.removeprefix("/opt/est_ds/")).exists(), word
    names = {e["name"]: e["value"] for e in container["env"]}
    assert int(names["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    for argument in trained[0]["build"]["args"]:
        assert f"ARG {argument}=" in dockerfile


def test_processes_of_a_node_get_their_ranks_and_the_gpus_that_are_theirs(tmp_path):
    (tmp_path / "shows_itself.py").write_text(SHOWS_ITSELF)
    # The second node of two, on which the GPUs 5 and 2 are to be used.
    slots = {"node-0": 2, "node-1": 2}
    where = Launch(slots, ("10.0.0.7", 29507), (5, 2), node_rank=1, module="shows_itself")
    done = subprocess.run(
        where.command(["word"], tmp_path),
        env={**os.environ, "PYTHONPATH": str(tmp_path), "DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"{2 + local} {local} 4 10.0.0.7 29507 5,2" for local in (0, 1)
    ]
