"""What goes wrong around a run: signals, kills, full disks, damaged files, processes that die. Nothing is lost."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tally
from nursery import Child, last_line, same

import convert
import flm
from run import read_checkpoint
from sources import UserError
from test_flm import HERE, TINY, command, released, settings

TEXT = "".join(f"{word}{i}\n" for i in range(300) for word in ("one ", "twenty "))
LINE = f"--run-dir r --dataset a.txt --tokenizer chars --seq-len 16 --log-every 5 {TINY.replace('--log-every 1', '')}"
FLOW = f"{LINE} --max-steps 200 --eval-every 20"
MAP = "--run-dir r --no-bf16 --objective two-stage --max-steps 60 --eval-every 10"
TRAINING = [("flm.py", "flm", FLOW), ("distill.py", "fmlm", MAP)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A flow, and a map in two stages, that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole")
    Path(folder, "a.txt").write_text(TEXT)
    assert Child("flm.py", FLOW, folder).status() == 0
    assert Child("distill.py", MAP, folder).status() == 0
    return folder / "r"


def torchrun(until: str) -> subprocess.Popen:
    """The flow on two processes, once it has said so."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "flm.py"),
            *FLOW.split(), "--threads", "1"]
    with open("err", "w") as err:
        run = subprocess.Popen(line, stderr=err, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while until not in Path("err").read_text():
        assert run.poll() is None, Path("err").read_text()
        time.sleep(0.05)
    return run


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
@pytest.mark.parametrize("program, kind, line", TRAINING)
def test_a_signal_ends_training_behind_a_step_that_is_saved(whole, folder, program, kind, line, number):
    """And what goes on from there ends in the bits of the run that was left alone."""
    if kind == "fmlm":
        shutil.copytree(whole, "r", ignore=shutil.ignore_patterns("fmlm*", "correction*"))
    child = Child(program, line, folder).until("step 20:" if kind == "flm" else "step 10:")
    time.sleep(0.05)
    assert child.hit(number).status(10) == 128 + number
    assert "holds step" in last_line(child.err) and "--resume goes on" in last_line(child.err) and "Trace" not in child.err
    again = Child(program, "--run-dir r --resume", folder)
    assert again.status() == 0, again.err
    assert same(Path("r", f"{kind}.pt"), whole / f"{kind}.pt")


@pytest.mark.parametrize("signals", (1, 2))
def test_a_process_ends_in_the_middle_of_a_step_that_takes_too_long(folder, signals):
    """One signal: within 10 s. Two: at once."""
    child = Child("flm.py", f"{LINE} --max-steps 9 --batch-size 65536 --width 256 --heads 4 --depth 8", folder)
    child.until("to train")
    time.sleep(1)
    start = time.monotonic()
    for _ in range(signals):
        child.hit(signal.SIGTERM)
        time.sleep(0.3)
    assert child.status(15) == 128 + signal.SIGTERM
    took = time.monotonic() - start
    assert took < 10 if signals == 1 else took < 2
    assert last_line(child.err) .startswith("ended at once; what was saved is whole")


def test_a_signal_ends_preparation_and_the_same_command_goes_on(folder):
    Path("a.txt").write_text("\n".join(f"{i} {i * i} {i ** 3}" for i in range(550_000)))  # 17 MB: two processes at work
    line = f"{FLOW} --packing --stop-after 1"
    for number in signal.SIGINT, signal.SIGTERM:
        child = Child("flm.py", line, folder).until("tokenising a")
        time.sleep(0.5)
        assert child.hit(number).status(10) == 128 + number
        assert "the same command" in child.err and "Trace" not in child.err
        assert not list(Path("data").glob("a-*")) and list(Path("data").glob(".a-*.part"))
    run = subprocess.Popen([sys.executable, str(HERE / "flm.py"), *line.split()], stderr=open("err", "w"),
                           start_new_session=True)
    while "tokenising a" not in Path("err").read_text():
        assert run.poll() is None
    time.sleep(0.5)
    os.killpg(run.pid, signal.SIGHUP)  # a terminal that is closed tells all its processes
    assert run.wait(10) == 128 + signal.SIGHUP and "Error" not in Path("err").read_text()
    again = Child("flm.py", line, folder)
    assert again.status() == 0, again.err


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_an_evaluation(whole, folder, number):
    shutil.copytree(whole, "r")
    child = Child("evaluate.py", "--run-dir r --num-samples 20000", folder)
    time.sleep(1.5)
    assert child.hit(number).status(10) == 128 + number
    assert last_line(child.err) == "interrupted" and not Path("r/quality.json").exists()


@pytest.mark.parametrize("program, kind, line", TRAINING)
def test_resuming_after_kills_at_any_moment_ends_in_the_same_bits(whole, folder, program, kind, line):
    """20 kills each, at random moments after the run has begun: in steps, while saving, in evaluations."""
    if kind == "fmlm":
        shutil.copytree(whole, "r", ignore=shutil.ignore_patterns("fmlm*", "correction*"))
    moments, child = random.Random(0), Child(program, line, folder)
    child.until("to train" if kind == "flm" else "distillation")
    for _ in range(20):
        time.sleep(moments.uniform(0, 0.08))
        child.hit(signal.SIGKILL).status()
        child = Child(program, "--run-dir r --resume", folder).until("to train" if kind == "flm" else "distillation")
    assert child.status() == 0, child.err
    assert same(Path("r", f"{kind}.pt"), whole / f"{kind}.pt")
    log, untouched = ([json.loads(line) for line in (place / f"{kind}.log.jsonl").read_text().splitlines()]
                      for place in (Path("r"), whole))
    steps = [line["step"] for line in log if "loss" in line]
    assert steps == sorted(set(steps)) and {line["step"]: line.get("heldout") for line in log} == {
        line["step"]: line.get("heldout") for line in untouched}


def test_a_full_disk_costs_no_checkpoint_and_ends_no_run(whole, folder):
    """A limit on the size of files stands for the disk: K.pt keeps the step before, until there is room again."""
    assert Child("flm.py", f"{FLOW} --stop-after 40", folder).status() == 0
    kept = Path("r/flm.pt").read_bytes()
    child = Child("flm.py", "--run-dir r --resume", folder, most=len(kept) // 2).until("tries again at the next save")
    assert Path("r/flm.pt").read_bytes() == kept and not Path("r/flm.part").exists()
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert child.status() == 0, child.err
    assert same(Path("r/flm.pt"), whole / "flm.pt")


def test_a_log_that_finds_no_room_is_whole_when_it_does(folder, whole):
    shutil.copytree(whole.parent / "data", "data")
    child = Child("flm.py", FLOW, folder, most=2000).until("flm.log.jsonl: cannot be written")
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert child.status() == 0, child.err
    steps = [[json.loads(line)["step"] for line in (place / "flm.log.jsonl").read_text().splitlines()] for place in
             (Path("r"), whole)]
    assert steps[0] == steps[1]


def test_a_last_save_that_fails_is_one_line(folder, whole):
    shutil.copytree(whole.parent / "data", "data")
    child = Child("flm.py", f"{LINE} --max-steps 20 --stop-after 5", folder, most=2000)
    assert child.status() == 2 and "r/flm.pt: cannot be written" in child.err and "make room" in child.err


def without_right(program: str, line: str) -> subprocess.CompletedProcess:
    """A command for which permissions count, also if we are root."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return subprocess.run([*drop, sys.executable, str(HERE / program), *line.split()], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere")
@pytest.mark.parametrize("where", ("data", "r"))
def test_a_folder_that_may_not_be_written_is_one_line(folder, where):
    Path(where).mkdir(mode=0o555)
    done = without_right("flm.py", f"{LINE} --max-steps 1")
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Trace" not in done.stderr
    assert not list(Path(where).iterdir())


def test_a_second_run_in_a_folder_is_refused_as_long_as_the_first_lives(folder):
    first = Child("flm.py", FLOW.replace("200", "20000"), folder).until("step 20:")
    for program, line in ("flm.py", FLOW), ("flm.py", "--run-dir r --resume"), ("distill.py", "--run-dir r"), (
            "baselines.py", "--run-dir r"):
        second = Child(program, line, folder)
        assert second.status() == 2 and "another process is training there" in second.err
    first.hit(signal.SIGKILL).status()
    assert Child("flm.py", "--run-dir r --resume --stop-after 60", folder).status() == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("dead", (0, 1))
def test_one_of_two_processes_dies_and_the_other_says_which(whole, folder, dead):
    """Then one process goes on where two were, to the same losses."""
    run = torchrun("step 40:")
    victim = next(pid for pid in children(run.pid) if f"\0RANK={dead}\0" in Path(f"/proc/{pid}/environ").read_text())
    os.kill(victim, signal.SIGKILL)
    assert run.wait(60) != 0
    said = Path("err").read_text()
    assert f"flm.py: rank {dead} has ended, and so does rank {1 - dead}; --resume goes on" in said
    assert Child("flm.py", "--run-dir r --resume", folder).status() == 0
    logs = [(place / "flm.log.jsonl").read_text().splitlines() for place in (Path("r"), whole)]
    losses = [[line["loss"] for line in map(json.loads, log) if "loss" in line] for log in logs]
    assert len(losses[1]) == 40 and losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("numbers", ("both", "one"))
def test_a_signal_to_one_or_both_processes_saves_the_same_step(folder, numbers):
    run = torchrun("step 20:")
    os.kill(run.pid if numbers == "both" else children(run.pid)[0], signal.SIGTERM)
    assert run.wait(20) != 0
    assert "stopped; r/flm.pt holds step" in Path("err").read_text()
    assert read_checkpoint(Path("r/flm.pt"))["step"] > 20


def test_what_a_kill_leaves_of_an_overwritten_run_never_goes_on_as_the_old_one(folder, whole, monkeypatch):
    """Cut off at each file that is removed: the old run whole, or none that --resume knows, and the same command goes on."""
    for n in range(12):
        shutil.copytree(whole, "r", dirs_exist_ok=True)
        with monkeypatch.context() as cut:
            def unlink(path, missing_ok=False, left=[n]):  # noqa: B006
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                os.unlink(path) if path.exists() else None
            cut.setattr(Path, "unlink", unlink)
            with pytest.raises(KeyboardInterrupt):
                flm.main(f"{FLOW} --seed 7 --overwrite".split())
        if n:
            with pytest.raises(UserError, match="config.json: no such file, so no run to go on with"):
                flm.main("--run-dir r --resume".split())
    flm.main(f"{FLOW} --seed 7 --overwrite --stop-after 1".split())
    assert read_checkpoint(Path("r/flm.pt"))["step"] == 1
    shutil.rmtree("r")


def test_a_checkpoint_that_is_gone_is_offered_the_one_before(folder, whole):
    shutil.copytree(whole, "r")
    Path("r/flm.pt").unlink()
    for line in "--resume", "--sample":
        with pytest.raises(UserError, match="r/flm.pt: no such file; r/flm.prev.pt is the one before it"):
            flm.main(["--run-dir", "r", line])


@pytest.mark.parametrize("step", (40, 200))
def test_an_evaluation_that_was_cut_off_is_made_up_for(folder, whole, step):
    """In the middle of the run, and at its end: the log is that of a run left alone, and so is the picture there."""
    child = Child("flm.py", FLOW, folder)
    end = time.monotonic() + 60
    while not Path("r/flm.pt").exists() or read_checkpoint(Path("r/flm.pt"))["step"] < step:
        assert time.monotonic() < end
    child.hit(signal.SIGKILL).status()
    log = [json.loads(line) for line in Path("r/flm.log.jsonl").read_text().splitlines()]
    Path("r/flm.log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log if (
        line["step"], "heldout" in line) != (read_checkpoint(Path("r/flm.pt"))["step"], True)))  # as if it had been sooner
    again = Child("flm.py", "--run-dir r --resume", folder)
    assert again.status() == 0, again.err
    heldout = [{line["step"]: line["heldout"] for line in map(json.loads, (place / "flm.log.jsonl").read_text().splitlines())
                if "heldout" in line} for place in (Path("r"), whole)]
    assert heldout[0] == heldout[1] and Path("r/flm.loss.png").exists()


def test_a_tokenizer_that_is_gone_comes_back(folder, whole):
    shutil.copytree(whole, "r")
    Path("r/tokenizer.json").unlink()
    assert Child("flm.py", "--run-dir r --resume", folder).status() == 0
    assert Path("r/tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name, value", (("WORLD_SIZE", "2"), ("RANK", "abc")))
def test_half_a_torchrun_is_one_line_or_none(folder, name, value):
    done = subprocess.run([sys.executable, str(HERE / "flm.py"), *f"{LINE} --max-steps 1".split()], capture_output=True,
                          text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1", name: value})
    assert "Trace" not in done.stderr
    assert done.returncode == 0 if name == "RANK" else "start it by torchrun" in last_line(done.stderr)


def test_a_checkpoint_is_converted_whole_or_not_at_all(folder):
    """On a full disk the run that was there stays."""
    released("good.ckpt", 19, two_times=False)
    convert.main("good.ckpt --seq-len 8 --run-dir c".split())
    before = {path.name: path.read_bytes() for path in Path("c").iterdir()}
    child = Child("convert.py", "good.ckpt --seq-len 8 --run-dir c --overwrite", folder, most=20000)
    assert child.status() == 2 and "cannot be written" in child.err
    assert before == {path.name: path.read_bytes() for path in Path("c").iterdir()}


def test_a_damaged_checkpoint_is_refused_or_loads_every_tensor(whole, folder):
    """Cut off at 20 places, and with a bit flipped at 300; the one before it is offered."""
    shutil.copytree(whole, "r")
    path, random_, refused = Path("r/flm.pt"), random.Random(0), 0
    good = path.read_bytes()
    damaged = [good[: len(good) * i // 20] for i in range(20)]
    for _ in range(300):
        bad = bytearray(good)
        bad[random_.randrange(len(bad))] ^= 1 << random_.randrange(8)
        damaged.append(bytes(bad))
    tally["faults caused"] += len(damaged)
    for bad in damaged:
        path.write_bytes(bad)
        try:
            assert same(path, whole / "flm.pt")
        except UserError as error:
            refused += 1
            assert f"{path}: not a whole checkpoint" in str(error) and "flm.prev.pt is the one before it" in str(error)
    assert refused > 0.9 * len(damaged)  # the rest is padding, and names that nobody reads
    path.write_bytes(good[:1000])
    child = Child("flm.py", "--run-dir r --resume", folder)
    assert child.status() == 2 and "rename that" in last_line(child.err)
    os.replace("r/flm.prev.pt", path)
    assert Child("flm.py", "--run-dir r --resume", folder).status() == 0
    assert same(path, whole / "flm.pt")


def train(loss, line: str) -> None:
    config = settings(f"{TINY} --run-dir r {line}")
    Path("r").mkdir(exist_ok=True)
    corpus = flm.corpus_of(config)
    corpus.tokenizer.save(Path("r/tokenizer.json"))
    flm.train(flm.build(config, corpus.tokenizer, corpus.log_p), loss, corpus, config, "flm", flm.sample)


def nan_at(*steps: int):
    def loss(model, tokens, rows):
        nll, tau = flm.flow_loss(model, tokens, rows)
        return (nll * torch.nan if rows.step in steps else nll), tau
    return loss


def test_bad_steps_are_passed_over_if_one_says_so(folder):
    """Steps that are not a number move nothing but by momentum; too many end the run; none is as without the flag."""
    line = "--max-steps 20 --eval-every 5 --log-every 3"
    train(nan_at(4, 11), f"{line} --skip-bad-steps 2")
    content = read_checkpoint(Path("r/flm.pt"))
    assert content["step"] == 20 and all(x.isfinite().all() for x in content["ema"])
    log = [json.loads(line) for line in Path("r/flm.log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log if "skipped" in line][-1] == 2
    with pytest.raises(UserError, match="loss of step 11 .*flm.pt holds step 10; .*--skip-bad-steps 11"):
        train(nan_at(4, 11), f"{line} --skip-bad-steps 1")
    train(flm.flow_loss, line)
    Path("r/flm.pt").rename("plain.pt")
    train(flm.flow_loss, f"{line} --skip-bad-steps 5")
    assert same(Path("plain.pt"), Path("r/flm.pt"))


def test_a_loss_that_explodes_ends_the_run_with_the_last_good_checkpoint(folder):
    def loss(model, tokens, rows):
        nll, tau = flm.flow_loss(model, tokens, rows)
        return nll * (1e4 if rows.step >= 7 and rows.tau is None else 1), tau
    with pytest.raises(UserError, match="exploded, from .* in the steps before 9; r/flm.pt holds step 6"):
        train(loss, "--max-steps 20 --eval-every 6 --log-every 3")
    assert read_checkpoint(Path("r/flm.pt"))["step"] == 6


BACKWARDS = """
import time
start, true = time.time(), time.time
time.time = lambda: 2 * start - true()
"""


@pytest.mark.parametrize("name, change", (
    ("nothing", dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "TERM", "COLUMNS"))),
    ("odd", {"TERM": "dumb", "COLUMNS": "0", "LINES": "-1", "MPLBACKEND": "none", "DISPLAY": ":9", "HOME": "/dev/null"}),
    ("latin", {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ("clock", {"PYTHONPATH": "."})))
def test_a_strange_environment_is_no_trouble(folder, name, change):
    """No home, a terminal without width, no display, an encoding without our letters, a clock that goes backwards."""
    Path("sitecustomize.py").write_text(BACKWARDS)
    Path("ü.txt").write_text("".join(f"\u4f60\u597d {i}\n\u05e9\u05dc\u05d5\u05dd {i}\n" for i in range(99)), "utf-8")
    env = {k: v for k, v in (os.environ | {"OMP_NUM_THREADS": "1"} | change).items() if v is not None}
    line = f"{LINE} --dataset ü.txt --max-steps 20 --eval-every 10"
    done = subprocess.run([sys.executable, str(HERE / "flm.py"), *line.split()], capture_output=True, timeout=120, env=env)
    assert done.returncode == 0 and b"Trace" not in done.stderr and b"step 20: held-out" in done.stderr, done.stderr
    assert done.stdout and Path("r/flm.pt").exists()


@pytest.mark.parametrize("closing", ("| head -c 1 > /dev/null", ">&-", "2>&-", ">&- 2>&- <&-", "2>&1 | true", "> /dev/full"))
def test_nobody_needs_to_listen(folder, closing):
    """A closed pipe or stream ends no training, opens no file in its place, and shows no traceback."""
    line = f"{sys.executable} {HERE / 'flm.py'} {LINE} --max-steps 40 --eval-every 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} {closing}"], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "Trace" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert done.returncode == (2 if "full" in closing else 128 + signal.SIGPIPE if "|" in closing else 0), done.stderr
    assert read_checkpoint(Path("r/flm.pt"))["step"] == 40


def test_the_first_command_hears_signals_too(folder):
    """As a user has it: a process of its own, torchrun apart."""
    assert command(f"{FLOW} --stop-after 1").returncode == 0
    line = [sys.executable, str(HERE / "flm.py"), "--run-dir", "r", "--resume"]
    run = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while "step 20:" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert "--resume goes on" in run.communicate(timeout=10)[1] and run.returncode == 130
