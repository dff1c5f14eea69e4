"""The driver of a job, on its first node: pre-flight, ranks, and the way back into the queue until the run is done.

    python -m tunesmith.launch.cluster.job --run-dir <run> --nodes 2 ... -- <overrides of launch/train.py>

The script that launch/slurm.py submits runs this and nothing else. It exits with 0 when the run has finished, 2 when it
cannot be run as given, 75 when it was stopped, and with another code when it gives up. It prints a line for each
event, and writes the same to <run>/job/events.jsonl.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tunesmith.launch import preflight
from tunesmith.launch.arguments import main
from tunesmith.launch.cluster import controller, steps
from tunesmith.launch.cluster.events import append, restarts_without_progress, sick_nodes
from tunesmith.launch.cluster.figures import count
from tunesmith.launch.cluster.job_end import (
    JobEnd,
    cause_of_failure,
    ends_of,
    mistake_of,
    sick_nodes_of_the_run,
    unhealthy,
)
from tunesmith.launch.cluster.job_folder import JobFolder, find_job, make_room, write_job
from tunesmith.launch.cluster.job_spec import JobSpec
from tunesmith.launch.cluster.srun import Srun
from tunesmith.launch.cluster.start_status import CONTROLLER_SECONDS, RETRY_SECONDS, Allocation, StartStatus
from tunesmith.launch.training_process import TrainingExit
from tunesmith.train.errors import EXIT_MISTAKE, EXIT_STOPPED
from tunesmith.train.files import run_folder
from tunesmith.train.files.fence import fence, token_from_environment
from tunesmith.train.files.step_folders import newest_checkpoint
from tunesmith.train.ranks.fault_plan import RESTART
from tunesmith.train.ranks.stop import ENDS, QUIETLY, RUNNING, end
from tunesmith.train.redact import on_screen, redact_text
from tunesmith.train.watch.node_facts import SICK_NODES

PREFLIGHT_SECONDS = 120.0
PROBE_SECONDS = 20.0  # for a node to answer whose ranks left nothing
LAST_RANKS_SECONDS = 60.0  # for the other ranks once one has ended: srun may wait for a dead node much longer
POLL_SECONDS = 0.1
CANCELLED = JobEnd("it was cancelled", "stopped", EXIT_STOPPED)


class JobDriver:
    """Drives one start of a job. Raises ConfigError when another run has the folder."""

    def __init__(self, spec: JobSpec, allocation: Allocation) -> None:
        self._spec = spec
        self._here = allocation
        self._status = StartStatus(allocation)
        self._folder = spec.job_dir
        self._began = time.time()
        self._got_sigterm = False  # from SLURM: this job is being cancelled, requeued or preempted
        self._sigterm_is_noted = False

    def run(self) -> int:
        """The exit code of the job."""
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # meant for the ranks
        self._take_folder()
        self._explain_last_end()
        self._note("started", nodes=list(self._here.nodes))
        return self._end(self._refuse() or self._preflight() or self._train())

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._got_sigterm = True

    def _take_folder(self) -> None:
        """First of all: from here on an earlier start of this job, on a node that is cut off, can write nothing."""
        self._folder.mkdir(parents=True, exist_ok=True)
        token = token_from_environment()
        lock = run_folder.hold(self._spec.run_dir, token)
        fence.take(self._spec.run_dir, token)
        lock.release()  # the ranks take it
        job = find_job(self._spec.run_dir)
        if job is None or job.job_id != self._here.job_id:  # the script was submitted by hand
            make_room(self._folder)
            write_job(self._spec, self._here.job_id, time.time())

    @property
    def _job(self) -> JobFolder:
        return JobFolder(self._spec.run_dir, self._here.job_id)

    def _explain_last_end(self) -> None:
        """Records how the start before this one ended, if its node failed before it could do so."""
        last = self._job.last_turn()
        if not self._here.restart or last is None or last["event"] != "started":
            return
        nodes = [str(node) for node in last.get("nodes") or []]
        cause = unhealthy(nodes) or "SLURM requeued it: preempted, requeued by hand, or a node that recovered"
        self._note_end(cause, "requeued", restart=count(last.get("restart")))
        tell(f"restart {self._here.restart} of job {self._here.job_id}; the start before ended: {cause}")

    def _refuse(self) -> JobEnd | None:
        if self._job.stop_file.exists():
            return CANCELLED
        if self._here.restart > self._spec.max_restarts:
            return JobEnd(f"it was restarted {self._here.restart} times (cluster.max_restarts)", "failed", 1)
        return None

    def _preflight(self) -> JobEnd | None:
        """None when all nodes are fit."""
        if not self._spec.preflight:
            return None
        out = self._folder / "preflight"
        nonce = preflight.begin(out)
        command = steps.on_each_node(self._spec, preflight.command(out, self._spec.run_dir, nonce))
        said = steps.output_of(command, PREFLIGHT_SECONDS)
        if self._got_sigterm or self._job.stop_file.exists():
            return CANCELLED
        sick = preflight.sick_nodes(out, self._here.nodes, gpus=self._spec.gpus_per_node, said=said)
        named = {one.node: one.reason for one in sick if one.node}
        if len(named) == len(self._here.nodes):  # the step itself failed, or was told to end
            return JobEnd("the check of its nodes was ended, or could not be started", "again", 1)
        self._note_sick(named)
        if not sick:
            return None
        if len(named) == len(sick):
            return JobEnd(f"unfit nodes: {', '.join(named)} ({sick[0].reason})", "again", 1)
        return JobEnd(f"{sick[0].reason} {sick[0].do}", "failed", EXIT_MISTAKE)

    def _train(self) -> JobEnd:
        run_dir, restart = self._spec.run_dir, self._here.restart
        self._spec.log_dir(restart).mkdir(parents=True, exist_ok=True)
        ends, sick = self._folder / "ends" / str(restart), self._folder / f"sick-{restart}.jsonl"
        ends.mkdir(parents=True, exist_ok=True)
        for old in (*ends.iterdir(), *([sick] if sick.exists() else [])):
            old.unlink()
        resume = ["resume.source=auto"] if newest_checkpoint(run_dir) else []
        command = steps.training(self._spec, restart, [*self._spec.overrides, *resume])
        variables = {
            ENDS: str(ends),
            RESTART: str(restart),
            SICK_NODES: str(sick),
            QUIETLY: "1",
            "PYTHONUNBUFFERED": "1",
        }
        srun = Srun(command, os.environ | variables)
        return self._judge(self._wait(srun, ends), sick, srun.cause)

    def _wait(self, srun: Srun, ends: Path) -> TrainingExit:
        """Waits until srun has ended, or only nodes that are gone keep it from ending.

        The srun of a start that was cut off is killed before its ranks end: it would end the step of that number, which
        is the newer start's by now, as soon as the controller hears it (seen in 22.05).
        """
        first_end = None
        self._status.note_limit()
        while srun.runs:
            time.sleep(POLL_SECONDS)
            if self._status.is_fenced_off():
                srun.forget()
            self._note_sigterm()
            said = ends_of(ends)
            failed = any(one != RUNNING and one.split()[:1] != ["0"] for one in said.values())
            first_end = first_end or (time.monotonic() if failed else None)
            if first_end is not None and time.monotonic() - first_end > LAST_RANKS_SECONDS:
                srun.kill()
        return TrainingExit(srun.wait(), ends_of(ends))

    def _note_sigterm(self) -> None:
        """At once, as this process may be killed before the ranks have ended."""
        facts = self._status.facts() if self._got_sigterm and not self._sigterm_is_noted else None
        if facts is None:
            return
        self._sigterm_is_noted = True
        if self._status.was_restarted(facts):
            known = (cause_of_failure(self._spec.run_dir, self._began), unhealthy(self._here.nodes))
            cause = "; ".join(filter(None, known)) or "requeued by hand, or preempted"
            self._note_end(cause, "requeued")
            tell(f"requeued by SLURM: {cause}")
        elif not self._status.time_is_over():
            self._note_end("cancelled", "stopped")

    def _is_cancelled(self) -> bool:
        return self._job.stop_file.exists() or (self._got_sigterm and not self._status.time_is_over())

    def _judge(self, ended: TrainingExit, sick: Path, srun_said: str) -> JobEnd:
        if ended.finished or (ended.code == 0 and run_folder.is_finished(self._spec.run_dir)):
            return JobEnd("the run has finished", "finished", 0)
        if self._status.is_fenced_off():
            return JobEnd("this node was cut off", "again", 1)
        if ended.mistake and not sick.exists():
            return JobEnd(mistake_of(ended), "failed", EXIT_MISTAKE)
        if self._is_cancelled():
            return CANCELLED
        if ended.was_stopped:
            reasons = sorted({said.split()[1] for said in ended.ranks.values() if len(said.split()) > 1} - {"another"})
            return JobEnd(f"its ranks stopped as they were asked to ({', '.join(reasons) or 'together'})", "again", 75)
        lost = self._lost_nodes(ended) | sick_nodes_of_the_run(sick)
        self._note_sick(lost)
        names = "".join(f"; node {node}: {reason}" for node, reason in lost.items())
        cause = cause_of_failure(self._spec.run_dir, self._began) or srun_said or ended.how
        return JobEnd(f"{cause}{names}", "again", ended.code or 1)

    def _lost_nodes(self, ended: TrainingExit) -> dict[str, str]:
        """Of the nodes whose ranks left no exit code, those that do not answer; none while SLURM itself is silent."""
        per_node = self._spec.ranks_per_node
        silent = [rank for rank in range(self._spec.world_size) if ended.ranks.get(rank, RUNNING) == RUNNING]
        nodes = sorted({self._here.nodes[rank // per_node] for rank in silent} - {self._here.nodes[0]})
        if not nodes or self._status.facts() is None:
            return {}
        lost = controller.unhealthy_nodes(nodes)
        for node in [node for node in nodes if node not in lost]:
            if self._is_cancelled():
                break
            if steps.output_of(steps.on_node(node, ["echo", "here"]), PROBE_SECONDS).strip() != "here":
                lost[node] = f"no answer within {PROBE_SECONDS:g} s"
        return lost

    def _end(self, job_end: JobEnd) -> int:
        if job_end.then == "again":
            job_end = self._again(job_end)
        elif self._got_sigterm and job_end.then == "stopped":
            self._note_sigterm()  # SLURM may be starting it again
        else:
            self._note_end(job_end.cause, job_end.then)
            tell(f"{job_end.then}: {job_end.cause}")
        return job_end.code

    def _again(self, job_end: JobEnd) -> JobEnd:
        """Requeues the job, unless there is a newer start already, somebody has cancelled it, or it must give up."""
        step = newest_checkpoint(self._spec.run_dir)
        if self._status.is_superseded():
            tell(f"{job_end.cause}; job {self._here.job_id} has been started again, so this start ends")
            return job_end
        if self._is_cancelled():
            self._note_sigterm() if self._got_sigterm else self._note_end("it was cancelled", "stopped")
            return CANCELLED
        in_vain = restarts_without_progress([*self._job.own_events(), {"event": "ended", "step": step}])
        if self._here.restart >= self._spec.max_restarts:
            last = f"restart {self._here.restart} was the last (cluster.max_restarts={self._spec.max_restarts})"
            return self._give_up(f"{job_end.cause}; {last}", job_end.code)
        if in_vain >= self._spec.no_progress:
            last = f"{in_vain} starts in a row made no newer checkpoint (cluster.no_progress)"
            return self._give_up(f"{job_end.cause}; {last}", job_end.code)
        self._note_end(job_end.cause, "requeued")
        tell(f"back into the queue at step {step}: {job_end.cause}")
        if problem := self._requeue():
            return self._give_up(f"{job_end.cause}; SLURM does not requeue it: {problem}", job_end.code)
        return job_end

    def _requeue(self) -> str:
        """Why SLURM refuses; empty once the job is in the queue again."""
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # SLURM sends it in answer; the command after that must not get it
        away = sorted({*self._spec.exclude, *sick_nodes(self._folder)})
        deadline = time.monotonic() + CONTROLLER_SECONDS
        while (problem := controller.requeue(self._here.job_id, away)) and time.monotonic() < deadline:
            if not controller.is_unreachable(problem):
                return problem
            if self._status.is_superseded():  # the request had arrived after all
                return ""
            time.sleep(RETRY_SECONDS)
        return problem

    def _give_up(self, cause: str, code: int) -> JobEnd:
        self._note_end(cause, "failed")
        tell(f"failed: {cause}")
        return JobEnd(cause, "failed", code or 1)

    def _note_sick(self, nodes: dict[str, str]) -> None:
        for node, reason in nodes.items():
            self._note("sick", node=node, reason=reason)
            tell(f"node {node} is left out from now on: {reason}")

    def _note_end(self, cause: str, then: str, restart: int | None = None) -> None:
        step = newest_checkpoint(self._spec.run_dir)
        self._note("ended", restart=restart, cause=cause, then=then, step=step)

    def _note(self, event: str, *, restart: int | None = None, **values: object) -> None:
        if self._status.is_fenced_off():
            return
        clean = {name: redact_text(value) if isinstance(value, str) else value for name, value in values.items()}
        number = self._here.restart if restart is None else restart
        append(self._folder, number, event, job_id=self._here.job_id, **clean)


def tell(text: str) -> None:
    sys.stdout.write(f"job: {on_screen(text)}\n")
    sys.stdout.flush()


def job(arguments: list[str]) -> None:
    end(JobDriver(JobSpec.parse(arguments), Allocation.from_environment()).run())


if __name__ == "__main__":
    main(job)
