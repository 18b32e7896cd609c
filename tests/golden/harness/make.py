"""Remakes data/ and recorded/: what lm-evaluation-harness gives for the same checkpoints and documents.

    pip install "lm-eval[hf]==0.4.13" torch transformers safetensors
    python tests/golden/harness/make.py            # own documents, the embedded teacher
    python tests/golden/harness/make.py SHARED     # real documents, stories260K and a golden hybrid; own documents, a hybrid of
                                                   # the embedded teacher (zebra_torch.py of SHARED/tools renders hybrids)
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NAMED = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "mmlu", "lambada_openai", "blimp", "race", "truthfulqa_mc1", "truthfulqa_mc2")
# The hybrid that tests/golden/harness.rs composes, too.
HYBRID = ("--init", "reference", "--seed", "1", "--mla", "1", "--kv-rank", "16", "--rope-dim", "8")
NAMES, COLOURS = ["Tom", "Mia", "Ben", "Lucy", "Max", "Emma"], ["red", "blue", "green", "pink", "white", "black"]
TOYS, PLACES = ["ball", "kite", "boat", "drum", "cup", "bell"], ["park", "river", "forest", "lake", "school", "farm"]


def documents():
    """Six documents a task, in the words of the embedded teacher's stories; file name -> rows."""
    files = {}
    six = range(6)
    story = [f"{NAMES[i]} had a {COLOURS[i]} {TOYS[i]}. {NAMES[i - 1]} walked to the {PLACES[i]}." for i in six]

    def arc(shift):
        return [{"id": f"{i}", "question": f"{story[i]} What did {NAMES[i]} have?",
                 "choices": {"text": [f"a {COLOURS[(i + shift + k) % 6]} {TOYS[(i + k) % 6]}" for k in range(4)],
                             "label": ["A", "B", "C", "D"] if i % 2 else ["1", "2", "3", "4"]},
                 "answerKey": ("ABCD" if i % 2 else "1234")[(i + shift) % 4]} for i in six]

    files["arc_easy_test"], files["arc_easy_train"] = arc(0), arc(1) + arc(2)
    files["arc_challenge_test"] = arc(3)
    files["openbookqa_test"] = [{"id": r["id"], "question_stem": story[i] + " They went", "choices": r["choices"],
                                 "answerKey": r["answerKey"]} for i, r in enumerate(arc(2))]
    files["piqa_validation"] = [{"goal": f"play with the {TOYS[i]}", "sol1": f"Take the {COLOURS[i]} {TOYS[i]} to the {PLACES[i]}.",
                                 "sol2": f"Put the {PLACES[i]} into the {TOYS[i]}.", "label": i % 2} for i in six]
    files["hellaswag_validation"] = [
        {"ind": i, "activity_label": "Playing", "ctx_a": f"{story[i]} [header] The sun was warm.", "ctx_b": "they SANG",
         "ctx": "", "endings": [f"a happy song at the {PLACES[(i + k) % 6]}.  [title] Then they sat down [step] to rest."
                                for k in range(4)], "label": str(i % 4)} for i in six]
    files["winogrande_validation"] = [
        {"sentence": f"{NAMES[i]} gave {NAMES[i - 1]} the {TOYS[i]} because _ loved the {COLOURS[i]} {TOYS[i]}.",
         "option1": NAMES[i], "option2": NAMES[i - 1], "answer": str(1 + i % 2)} for i in six]
    files["winogrande_train"] = [dict(r, sentence=r["sentence"].replace("gave", "told")) for r in files["winogrande_validation"]]
    subjects = ["high_school_toys", "world_places"]
    mmlu = lambda word: [{"question": f" {word} {story[i]} Who had it? ", "subject": s, "choices": NAMES[i % 3:i % 3 + 4], "answer": i % 4}
                         for s in subjects for i in six]
    files["mmlu_test"], files["mmlu_dev"] = mmlu("One day"), mmlu("At last")
    files["lambada_openai_test"] = [{"text": f"{story[i]} {NAMES[i]} loved the {COLOURS[i]} {TOYS[i]} very much. {NAMES[i]} played with the {COLOURS[i]} {TOYS[i]}"}
                                    for i in six]
    files["blimp/toys_one"] = [{"sentence_good": f"{NAMES[i]} had a {TOYS[i]}.", "sentence_bad": f"{NAMES[i]} a had {TOYS[i]}.", "UID": "toys_one"} for i in six]
    files["blimp/toys_two"] = [{"sentence_good": "Tom saw Mia.", "sentence_bad": f"Tom Mia saw the {PLACES[i]}.", "UID": "toys_two"} for i in six[:4]]
    problem = lambda i, q: {"question": q, "answer": "ABCD"[i % 4], "options": [f"{NAMES[(i + k) % 6]}'s {TOYS[k]}" for k in range(4)]}
    files["race_test"] = [{"article": " ".join(story[:3]), "problems": repr(
        [problem(i, f"{NAMES[i]} loved the  _  ."), problem(i + 1, 'Who said "I like it"?'), problem(i + 2, f"What was at the {PLACES[i]}?")])} for i in six]
    target = lambda i, n: {"choices": [f"It was a {COLOURS[(i + k) % 6]} {TOYS[i]}." for k in range(n)], "labels": [1] + [(i + k) % 2 for k in range(1, n)]}
    files["truthfulqa_validation"] = [{"question": f"What did {NAMES[i]} have?", "mc1_targets": {"choices": target(i, 3)["choices"], "labels": [1, 0, 0]},
                                       "mc2_targets": target(i, 4)} for i in six]
    return files


def rows(path):
    return [json.loads(line) for line in open(path)]


def tasks_of(data, name, num_fewshot, scratch):
    """Specs of the harness's own tasks (its prompts, metrics, samplers) on local files."""
    find = lambda split: next(iter(sorted(data.glob(f"{name}*{split}*.jsonl"))), None)
    spec = lambda task, files, **more: dict(task=task, dataset_path="json", dataset_name=None, num_fewshot=num_fewshot,
                                            dataset_kwargs={"data_files": {k: str(v) for k, v in files.items() if v}}, **more)
    if name == "blimp":
        template = {"output_type": "multiple_choice", "validation_split": "train", "doc_to_text": "", "doc_to_target": 0,
                    "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "metric_list": [{"metric": "acc"}]}
        return [spec(f"blimp_{p.stem}", {"train": p}, **template) for p in sorted((data / "blimp").glob("*.jsonl"))]
    if name == "mmlu":
        specs = []
        for subject in sorted({r["subject"] for r in rows(find("test"))}):
            files = {}
            for split in ("test", "dev"):
                files[split] = Path(scratch) / f"{subject}-{split}.jsonl"
                kept = [r for r in rows(find(split)) if r["subject"] == subject]
                files[split].write_text("".join(json.dumps(r) + "\n" for r in kept))
            base = json.loads(json.dumps({
                "test_split": "test", "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}, "output_type": "multiple_choice",
                "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
                "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
                "description": f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"}))
            specs.append(spec(f"mmlu_{subject}", files, **base))
        return specs
    files = {split: find(split) for split in ("test", "validation", "train")}
    prefix = name.split("_")[0] if name.startswith("truthfulqa") else name
    if prefix != name:
        files = {"validation": next(iter(data.glob(f"{prefix}*validation*.jsonl")), None)}
    absent = {{"train": "training_split"}.get(k, f"{k}_split"): None for k, v in files.items() if not v}
    return [spec(name, files, **absent)]


class Peer(HFLM):
    """The harness on a hybrid that PyTorch renders."""

    def attach(self, lm):
        self.peer = lm
        return self

    def _model_call(self, inps, attn_mask=None, labels=None):
        with torch.no_grad():
            return self.peer(inps)[0]


def built(manager, spec):
    """The harness's own task where it has one of that name, on our files."""
    entry = manager._entry(spec["task"])
    return manager._factory.build(entry, overrides=spec, registry=manager._index) if entry else spec


def record(lm, data, wanted, limit):
    manager, found = TaskManager(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, num_fewshot in wanted:
            for spec in tasks_of(data, name, num_fewshot, scratch):
                out = evaluator.simple_evaluate(lm, tasks=[built(manager, spec)], task_manager=manager, limit=limit, bootstrap_iters=100, log_samples=True)
                task = spec["task"]
                samples = sorted(out["samples"][task], key=lambda s: s["doc_id"])
                found[f"{task}@{num_fewshot}"] = {
                    "results": {k: v for k, v in out["results"][task].items() if k.split(",")[0] in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "perplexity")},
                    "samples": [[[float(r[0]), bool(r[1])] for r in s["filtered_resps"]] for s in samples]}
                print(task, num_fewshot, found[f"{task}@{num_fewshot}"]["results"])
    return found


def main():
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        shared = Path(sys.argv[1])
        sys.path.insert(0, str(shared / "tools"))
        import zebra_torch as z
        wanted = [(n, 0) for n in ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "mmlu", "lambada_openai", "blimp")]
        teacher = shared / "teachers/stories260K"
        load = lambda kind: kind(pretrained=str(teacher), dtype="float32", device="cpu", batch_size=16)
        def hybrid(folder, tokenizer):
            c, hc = (json.loads((folder / n).read_text()) for n in ("config.json", "hybrid_config.json"))
            lm = z.LM(c, [(z.MLA if i in hc["mla_layers"] else z.Mamba2)(hc) for i in range(c["num_hidden_layers"])])
            lm.load_state_dict(z.load(folder / "model.safetensors"))
            return Peer(pretrained=str(tokenizer), dtype="float32", device="cpu", batch_size=16).attach(lm.eval())

        with tempfile.TemporaryDirectory() as scratch:
            zebroid = lambda *args: subprocess.run(["cargo", "run", "--release", "--quiet", "--", *args], cwd=ROOT, check=True)
            zebroid("compose", "assets/teacher", f"{scratch}/own", *HYBRID)
            zebroid("export", f"{scratch}/own", f"{scratch}/amd", "--format", "amd")
            own = hybrid(Path(scratch) / "amd", ROOT / "assets/teacher")
        write("embedded-hybrid", record(own, HERE / "data", [(n, 0) for n in NAMED] + [("arc_easy", 3)], None))
        golden = hybrid(shared / "golden/zebra-2mla3m2", teacher)
        for name, lm in [("stories260K", load(HFLM)), ("zebra-2mla3m2", golden)]:
            write(f"shared-{name}", record(lm, shared / "data/eval", wanted, 3))
        return
    data = HERE / "data"
    for name, lines in documents().items():
        path = data / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    parquet(data, {"arc_easy_test": "ARC-Easy/test", "arc_easy_train": "ARC-Easy/train", "mmlu_test": "all/test",
                   "blimp/toys_one": "toys_one/train", "blimp/toys_two": "toys_two/train"})
    wanted = [(n, 0) for n in NAMED] + [("arc_easy", 3), ("winogrande", 2), ("mmlu", 5), ("race", 1)]
    lm = HFLM(pretrained=str(ROOT / "assets/teacher"), dtype="float32", device="cpu", batch_size=4)
    write("embedded", record(lm, data, wanted, None))


def parquet(data, splits):
    """The hub's layout: hub/CONFIG/SPLIT/0000.parquet."""
    for name, place in splits.items():
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        path = HERE / "hub" / place / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write(name, found):
    (HERE / "recorded").mkdir(exist_ok=True)
    (HERE / "recorded" / f"{name}.json").write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
