"""The cluster of these tests is what it claims to be."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
HERE = Path(__file__).parent


def test_srun_runs_ranks_on_nodes_of_their_own(slurm):
    said = slurm.run(
        "srun", "-N2", "--ntasks-per-node=2", "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME $(hostname) $$"
    )
    ranks = sorted(line.split() for line in said.splitlines())
    assert [rank[0] for rank in ranks] == ["0", "1", "2", "3"]
    nodes = [rank[1] for rank in ranks]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    if slurm.has_networks:
        assert [rank[2] for rank in ranks] == nodes  # each has its own host name
        assert slurm.verb("exec", "n2", "hostname", "-i").split() != slurm.verb("exec", "n1", "hostname", "-i").split()


def test_a_job_runs_again_elsewhere_when_its_node_crashes(slurm, make_job):
    job = slurm.submit(make_job("srun sleep 300", "--nodes=2", "--requeue"))
    before = slurm.wait_for(job, "RUNNING")
    lost = slurm.run("scontrol", "show", "hostnames", before["NodeList"]).splitlines()[1]
    slurm.verb("crash", slurm.host(lost))
    try:
        after = slurm.wait_for(job, "RUNNING", restarts=1, timeout=60)
        assert lost not in slurm.run("scontrol", "show", "hostnames", after["NodeList"]).splitlines()
        slurm.wait_for_node(lost, "down*", "down", timeout=5)
    finally:
        slurm.verb("boot", slurm.host(lost))
        slurm.run("scancel", job)
    slurm.wait_for_node(lost, "idle")


def test_a_cut_link_is_noticed_and_the_old_ranks_run_on(slurm, make_job, tmp_path):
    if not slurm.has_networks:
        pytest.skip("the nodes have no networks of their own: that needs root")
    beats = 'srun bash -c "while sleep 0.2; do date +%s.%N >>$FILE; done"'
    job = slurm.submit(make_job(beats, "--nodes=1", "--requeue"), env={"FILE": str(tmp_path / "beats")})
    node = slurm.wait_for(job, "RUNNING")["NodeList"]
    slurm.verb("link", node, "down")
    try:
        slurm.wait_for_node(node, "down*", timeout=60)
        count = len((tmp_path / "beats").read_text().splitlines())
        slurm.run("scontrol", "hold", job)  # so that what beats from here on are the old ranks
        assert slurm.facts(job)["JobState"] == "PENDING"
        slurm.run("sleep", "2")
        assert len((tmp_path / "beats").read_text().splitlines()) > count + 4
    finally:
        slurm.verb("link", node, "up")
        slurm.run("scancel", job)
    slurm.wait_for_node(node, "idle")


def test_a_training_can_be_imported_on_a_node(slurm, training_env):
    program = "import tunesmith.train.config.compose, torch.distributed as d; print(d.is_gloo_available())"
    said = slurm.run("srun", "-N1", sys.executable, "-c", program, env=training_env, timeout=120)
    assert said.splitlines()[-1] == "True"
    assert list(Path(training_env["TORCH_EXTENSIONS_DIR"]).glob("**/*.so"))


def test_scripts_are_clean():
    scripts = [str(HERE / "slurm_cluster.sh"), str(HERE / "install.sh")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
