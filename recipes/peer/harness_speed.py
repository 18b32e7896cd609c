"""Documents a second of lm-evaluation-harness on local files, with the model loaded: seconds from the task definitions and the data
on disk to the scores, of the evaluation alone, and of processor time.   harness_speed.py MODEL DATA TASK BATCH_SIZE LIMIT
What harness_speed.sh printed, as medians and ranges.   harness_speed.py < LINES"""
import statistics
import sys
import tempfile
import time
from pathlib import Path


def measure(model, data, name, batch_size, limit):
    import torch
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/golden/harness"))
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from make import tasks_of

    torch.set_num_threads(2)
    lm, manager = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch_size), TaskManager()
    with tempfile.TemporaryDirectory() as scratch:
        # The library's copy of the data is warm, as after a first run.
        tasks_of(manager, data, name, 0, scratch)
        start, processor = time.time(), time.process_time()
        task = tasks_of(manager, data, name, 0, scratch)
        opened = time.time()
        # Not `simple_evaluate`, which collects facts about the machine afterwards.
        out = evaluator.evaluate(lm, manager.load([task]), limit=limit, bootstrap_iters=0, log_samples=False)
        end, processor = time.time(), time.process_time() - processor
    documents = sum(n["effective"] for n in out["n-samples"].values())
    print(documents, f"{end - start:.2f}", f"{end - opened:.2f}", f"{processor:.2f}")


def summary(lines):
    found = {}
    for line in lines:
        task, who, documents, whole, scoring, processor, _ = line.rstrip("\n").split("\t")
        found.setdefault((task, who), []).append([int(documents) / float(s) for s in (whole, scoring, processor)])
    for (task, who), rates in found.items():
        shown = [f"{statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in zip(*rates)]
        print(f"{task}, {who}, {len(rates)} turns: {shown[0]} documents/s, data included; {shown[1]} without; "
              f"{shown[2]} a second of processor time")


if len(sys.argv) > 1:
    measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
else:
    summary(sys.stdin)
