"""The torture table: what is done to a run, and what must come of it. A test names its row: @pytest.mark.row(n)."""

FAULTS = {
    1: ("a rank is killed in mid-step", "all gone in 10 s, one cause line, resumed bitwise, at most an interval lost"),
    2: ("one rank raises an exception", "all gone in 10 s, its traceback first, one cause line"),
    3: ("one rank exits with code 0", "the job fails in 10 s"),
    4: (
        "a rank hangs: asleep, stopped, holding the GIL",
        "found within the timeout + 5 s, with rank, phase, stacks",
    ),
    5: ("a hang inside a save or an evaluation", "the timeout of that phase; the last checkpoint is as it was"),
    6: ("killed at every file operation of a save", "the newest valid step loads, bitwise, each time"),
    7: ("the disk is full on one rank", "the save is dropped by all, training goes on; the third in a row ends it"),
    8: ("a shard is cut to 0, 50, 99 %", "quarantined in one line, the step before is used"),
    9: ("one bit is flipped, 100 times", "100 of 100 refused"),
    10: ("a shard, the manifest or latest.json missing, empty or pointing nowhere", "found by a scan; no fresh start"),
    11: ("every checkpoint is bad", "refused, exit code not 0, says how to go on"),
    12: ("shards of two steps mixed", "refused"),
    13: ("SIGTERM, SIGINT, SIGUSR1 in any phase, twice", "the step before is saved, exit 75, resumed bitwise"),
    14: ("signals to the launcher, or its death", "the ranks save and end; no orphans"),
    15: ("a time limit; a clock that jumps", "stopped and saved before it; the wall clock plays no part"),
    16: ("20 crashes in one run", "final weights bitwise; steps lost at most 20 intervals"),
    17: ("resumed in mid-epoch, twice, with dropout and accumulation", "losses and weights bitwise"),
    18: ("ranks 2 -> 4 -> 1 -> 2, ZeRO 1, 2, 3, 2 -> 3; LoRA, full; two groups", "losses within 1e-6, same order"),
    19: ("another learning rate, seed, data or base model on resume", "refused by name unless allowed by name"),
    20: ("NaN once, ten in a row, Inf on one rank, a spike", "skipped, counted, named; bounded; rolled back"),
    21: ("bad rows in the data", "named by file and line before step 0"),
    22: ("data that do not divide over the ranks", "no hang, the same steps on all"),
    23: ("a rank that is slow", "named within 20 steps; at most 1 false alarm in 1,000"),
    24: ("out of host memory", "one line: rank, phase, peak, what to set"),
    25: ("W&B refuses, stalls, fails in mid-run", "training unharmed, one line"),
    26: ("full log disk, taken port, two runs in one folder, stale build lock", "one line each, no hang over 30 s"),
    27: ("a weight's bit flips in memory on one rank", "the rank is named within the interval of the check"),
    28: ("a pickle that runs code in a checkpoint or a model", "refused in one line, nothing ran"),
    29: ("_target_ in a config", "refused or inert, nothing ran"),
    30: ("a model folder with code of its own", "nothing ran; the message names the flag"),
    31: ("shell metacharacters in names, paths and overrides", "taken as they are or refused, nothing ran"),
    32: ("8 secrets in environment, arguments, config, URLs", "0 found in any artefact"),
    33: ("paths that lead out: .., links, tags, manifests", "refused; nothing written outside"),
    35: ("a checkpoint owned by another user, or world-writable", "refused"),
}

# Rows of the groundwork's table that have no test here, and why.
ABSENT = {
    34: "hostile webhook addresses: there is no webhook yet",
}
