"""Documents a second of lm-evaluation-harness on local files.   harness_speed.py MODEL DATA TASK BATCH_SIZE LIMIT"""
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/golden/harness"))
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from make import built, tasks_of

model, data, name, batch_size, limit = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(2)
lm, manager = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch_size), TaskManager()
with tempfile.TemporaryDirectory() as scratch:
    tasks = [built(manager, spec) for spec in tasks_of(data, name, 0, scratch)]
    start = time.time()
    out = evaluator.simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False)
    seconds = time.time() - start
documents = sum(n["effective"] for n in out["n-samples"].values())
print(f"{documents} documents, {documents / seconds:.1f} a second ({seconds:.1f} s)")
