"""Files for schedulers: manifests against Kubernetes' schemas, and the command inside each up to torchrun's command line."""

import os
import shlex
import subprocess
from itertools import pairwise

import kubernetes_validate
import pytest
import yaml

from megatron_vlm.cli.main import main
from tests.examples.shell import EXAMPLES, ROOT, environment

# file -> what its scheduler sets on the second of two nodes with 8 GPUs each
SCHEDULERS = {
    "k8s/pytorchjob.yml": {"PET_NNODES": 2, "PET_NODE_RANK": 1, "PET_NPROC_PER_NODE": 8, "MASTER_ADDR": "first",
                            "MASTER_PORT": 23456},
    "k8s/jobset.yml": {"JOB_COMPLETION_INDEX": 1},
    "skypilot/train.yml": {"SKYPILOT_NUM_NODES": 2, "SKYPILOT_NODE_RANK": 1, "SKYPILOT_NUM_GPUS_PER_NODE": 8,
                            "SKYPILOT_NODE_IPS": "first\nsecond"},
}  # fmt: skip


def manifest(name):
    return yaml.safe_load((EXAMPLES / name).read_text())


def pods(name):
    """(path, pod spec) of a manifest."""
    spec = manifest(name)["spec"]
    if name == "k8s/pytorchjob.yml":
        return [replica["template"]["spec"] for replica in spec["pytorchReplicaSpecs"].values()]
    return [job["template"]["spec"]["template"]["spec"] for job in spec["replicatedJobs"]]


def validate(kind, version, spec):
    kubernetes_validate.validate(
        {"apiVersion": version, "kind": kind, "metadata": {"name": "x"}, "spec": spec}, "1.34", strict=True
    )


@pytest.mark.parametrize("name", ["k8s/pytorchjob.yml", "k8s/jobset.yml"])
def test_pods_are_what_kubernetes_takes(name):
    for spec in pods(name):
        validate("Pod", "v1", spec)
        (container,) = spec["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert spec["terminationGracePeriodSeconds"] > 280  # what SHUTDOWN_TIMEOUT gives a run to save
    with pytest.raises(kubernetes_validate.ValidationError):
        validate("Pod", "v1", {**spec, "contaners": []})


def test_the_jobs_around_them():
    spec = manifest("k8s/jobset.yml")["spec"]
    (job,) = spec["replicatedJobs"]
    validate("Job", "batch/v1", job["template"]["spec"])
    names = {item["name"]: item.get("value") for item in pods("k8s/jobset.yml")[0]["containers"][0]["env"]}
    nodes = job["template"]["spec"]["completions"]
    assert str(nodes) == names["NNODES"] and job["template"]["spec"]["parallelism"] == nodes
    own = manifest("k8s/jobset.yml")["metadata"]["name"]
    assert names["MASTER_ADDR"] == f"{own}-{job['name']}-0-0.{own}"  # JobSet's name of the first pod, in its service
    replicas = manifest("k8s/pytorchjob.yml")["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1  # the operator's names
    assert all(pod["containers"][0]["name"] == "pytorch" for pod in pods("k8s/pytorchjob.yml"))


def inner(name, tmp_path, **more):
    """Runs what the file runs on a node, torchrun replaced by echo; returns the words of its command line."""
    content = manifest(name)
    given = {key: str(value) for key, value in SCHEDULERS[name].items()}
    if name.startswith("k8s"):
        (container,) = pods(name)[-1]["containers"]
        given |= {item["name"]: item["value"] for item in container["env"]}
        script = container["args"][0]
        assert container["command"] == ["sh", "-c"] and container["resources"]["limits"]["nvidia.com/gpu"] == 8
    else:
        given |= content["envs"]
        script = content["run"]
    given |= {"OUTPUT": str(tmp_path / "out"), "TORCHRUN": "echo", "TP": "2"} | more
    done = subprocess.run(
        ["sh", "-c", script], cwd=ROOT, env=environment(**given), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_inner_command(name, tmp_path):
    words = inner(name, tmp_path)
    options = dict(pairwise(words))
    wanted = {"--nnodes": "2", "--node-rank": "1", "--nproc-per-node": "8"}
    assert {key: options[key] for key in wanted} == wanted
    first = {"k8s/jobset.yml": "megatron-vlm-node-0-0.megatron-vlm"}.get(name, "first")
    assert options["--master-addr"] == first and int(options["--master-port"]) > 1024
    assert options["--save"] == str(tmp_path / "out") and any("training.global_batch_size=" in word for word in words)


@pytest.mark.full
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_dry_run_behind_it(name, tmp_path, capsys):
    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

    write_tiny_idefics2(tmp_path / "twin", layers=4)
    words = inner(name, tmp_path, MODEL=str(tmp_path / "twin"))
    train = words[words.index("megatron_vlm") + 1 :]
    assert main([*train, "--dry-run", "--world-size", "16", "--seq-length", "256"]) == 0
    assert "world size 16 = tp 2 x pp 1 x dp 8" in capsys.readouterr().out


def test_retries_on_other_machines(tmp_path):
    """A job a word, each after the one before did not finish; sbatch is a stand-in that notes its words."""
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nwc -l < {tmp_path}/calls | tr -d " "\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    names = environment(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", ARGS="optimizer.lr=1e-5")
    words = ["examples/finetune_idefics2.sh", "--nodes 4 --constraint h100", "--nodes 2", "--nodes 1"]
    done = subprocess.run(
        ["sh", "examples/slurm/retry.sh", *words], cwd=ROOT, env=names, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    job = "examples/slurm/train.sbatch examples/finetune_idefics2.sh optimizer.lr=1e-5"
    after = "--dependency=afternotok:{} --kill-on-invalid-dep=yes"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable --nodes 4 --constraint h100 {job}",
        f"--parsable {after.format(1)} --nodes 2 {job}",
        f"--parsable {after.format(2)} --nodes 1 {job}",
    ]
    assert done.stdout.splitlines()[0] == "job 1: --nodes 4 --constraint h100"
    short = subprocess.run(["sh", "examples/slurm/retry.sh", "x"], cwd=ROOT, env=names, capture_output=True, text=True)
    assert short.returncode == 1 and "a word for each job" in short.stderr
