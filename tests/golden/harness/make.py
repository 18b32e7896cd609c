"""Remakes data/ and recorded/: what lm-evaluation-harness gives for the same checkpoints and documents. Prompts, examples,
metrics and groups are those of its own task definitions; only the place of the data is ours.

    pip install "lm-eval[hf]==0.4.13" torch transformers safetensors pyarrow
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
from lm_eval.api.group import Group, GroupConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from articles import ARTICLES

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NAMED = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "mmlu", "lambada_openai", "blimp", "race", "truthfulqa_mc1", "truthfulqa_mc2")
# The group `fewshot`, and few-shot prompts of what else can have them. Beside the model's own context, which cuts most of
# these, they are read whole.
FEWSHOT = [("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("winogrande", 5), ("truthfulqa_mc2", 0),
           ("arc_easy", 3), ("openbookqa", 3), ("piqa", 2), ("winogrande", 2), ("lambada_openai", 2), ("race", 0), ("race", 1)]
LONG = 8192
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
    files["arc_challenge_test"], files["arc_challenge_train"] = arc(3), [row for shift in (0, 1, 2, 4, 5) for row in arc(shift)]
    book = lambda shift, where: [{"id": r["id"], "question_stem": f"{story[i]} {where}", "choices": r["choices"],
                                  "answerKey": r["answerKey"]} for i, r in enumerate(arc(shift))]
    files["openbookqa_test"], files["openbookqa_train"] = book(2, "They went"), book(1, "They saw")
    piqa = lambda verb, k: [{"goal": f"{verb} with the {TOYS[i]}", "sol1": f"Take the {COLOURS[i]} {TOYS[i]} to the {PLACES[i - k]}.",
                             "sol2": f"Put the {PLACES[i]} into the {TOYS[i - k]}.", "label": (i + k) % 2} for i in six]
    files["piqa_validation"], files["piqa_train"] = piqa("play", 0), piqa("walk", 1)
    hellaswag = lambda activity, k: [
        {"ind": i, "activity_label": activity, "ctx_a": f"{story[i - k]} [header] The sun was warm.", "ctx_b": "they SANG",
         "ctx": "", "endings": [f"a happy song at the {PLACES[(i + j) % 6]}.  [title] Then they sat down [step] to rest."
                                for j in range(4)], "label": str((i + k) % 4)} for i in six]
    files["hellaswag_validation"] = hellaswag("Playing", 0)
    files["hellaswag_train"] = hellaswag("Walking", 1) + hellaswag("Eating", 2) + hellaswag("Playing", 0)
    files["winogrande_validation"] = [
        {"sentence": f"{NAMES[i]} gave {NAMES[i - 1]} the {TOYS[i]} because _ loved the {COLOURS[i]} {TOYS[i]}.",
         "option1": NAMES[i], "option2": NAMES[i - 1], "answer": str(1 + i % 2)} for i in six]
    # The first document is among its own examples twice: who draws both has to draw again.
    files["winogrande_train"] = [dict(r, sentence=r["sentence"].replace("gave", "told")) for r in files["winogrande_validation"]]
    files["winogrande_train"] += files["winogrande_validation"][:1] * 2
    subjects = ["high_school_geography", "world_religions"]
    mmlu = lambda word: [{"question": f" {word} {story[i]} Who had it? ", "subject": s, "choices": NAMES[i % 3:i % 3 + 4], "answer": i % 4}
                         for s in subjects for i in six]
    files["mmlu_test"], files["mmlu_dev"] = mmlu("One day"), mmlu("At last")
    files["lambada_openai_test"] = [{"text": f"{story[i]} {NAMES[i]} loved the {COLOURS[i]} {TOYS[i]} very much. {NAMES[i]} played with the {COLOURS[i]} {TOYS[i]}"}
                                    for i in six]
    pairs = [(f"{NAMES[i]} had a {TOYS[i]}.", f"{NAMES[i]} a had {TOYS[i]}.") for i in six]
    more = [("Tom saw Mia.", f"Tom Mia saw the {PLACES[i]}.") for i in six[:4]]
    for paradigm, kept in (("anaphor_number_agreement", pairs), ("wh_island", more)):
        files[f"blimp/{paradigm}"] = [{"sentence_good": good, "sentence_bad": bad, "UID": paradigm} for good, bad in kept]
    problem = lambda i, q: {"question": q, "answer": "ABCD"[i % 4], "options": [f"{NAMES[(i + k) % 6]}'s {TOYS[k]}" for k in range(4)]}
    short = [(" ".join(story[:3]), [problem(i, f"{NAMES[i]} loved the  _  ."), problem(i + 1, 'Who said "I like it"?'),
                                    problem(i + 2, f"What was at the {PLACES[i]}?")]) for i in six[:2]]
    files["race_test"] = [{"article": article, "problems": repr(problems)} for article, problems in short + ARTICLES]
    target = lambda i, n: {"choices": [f"It was a {COLOURS[(i + k) % 6]} {TOYS[i]}." for k in range(n)], "labels": [1] + [(i + k) % 2 for k in range(1, n)]}
    files["truthfulqa_validation"] = [{"question": f"What did {NAMES[i]} have?", "mc1_targets": {"choices": target(i, 3)["choices"], "labels": [1, 0, 0]},
                                       "mc2_targets": target(i, 4)} for i in six]
    return files


def rows(path):
    return [json.loads(line) for line in open(path)]


def tasks_of(manager, data, name, num_fewshot, scratch):
    """The harness's own tasks of that name on local files, in its own group where it has one."""
    def own(task, files):
        entry = manager._entry(task)
        definition, files = manager._factory._load_full_config(entry, None), {k: str(v) for k, v in files.items() if v}
        absent = {k: None for k in ("training_split", "validation_split", "test_split") if definition.get(k) and definition[k] not in files}
        spec = dict(task=task, dataset_path="json", dataset_name=None, num_fewshot=num_fewshot, **absent,
                    dataset_kwargs={"data_files": files})
        return manager._factory.build(entry, overrides=spec, registry=manager._index)

    def group(members):
        config = manager._factory._load_full_config(manager._entry(name), None)
        whole = Group.from_config(GroupConfig(**{k: v for k, v in config.items() if k in ("group", "aggregate_metric_list", "metadata")}))
        for task in members:
            whole.add(task)
        return whole

    find = lambda split: next(iter(sorted(data.glob(f"{name}*{split}*.jsonl"))), None)
    if name == "blimp":
        return group(own(f"blimp_{p.stem}", {"train": p}) for p in sorted((data / "blimp").glob("*.jsonl")))
    if name == "mmlu":
        members = []
        for subject in sorted({r["subject"] for r in rows(find("test"))}):
            files = {}
            for split in ("test", "dev"):
                files[split] = Path(scratch) / f"{subject}-{split}.jsonl"
                kept = [r for r in rows(find(split)) if r["subject"] == subject]
                files[split].write_text("".join(json.dumps(r) + "\n" for r in kept))
            members.append(own(f"mmlu_{subject}", files))
        return group(members)
    files = {split: find(split) for split in ("test", "validation", "train")}
    if name.startswith("truthfulqa"):
        files = {"validation": next(iter(data.glob("truthfulqa*validation*.jsonl")), None)}
    return own(name, files)


class Peer(HFLM):
    """The harness on a hybrid that PyTorch renders."""

    def attach(self, lm):
        self.peer = lm
        return self

    def _model_call(self, inps, attn_mask=None, labels=None):
        with torch.no_grad():
            return self.peer(inps)[0]


def fingerprint(requests):
    """FNV-1a of every context and continuation of a document, a zero after each."""
    found = 0xCBF29CE484222325
    for text in (text for request in requests for text in request):
        for byte in text.encode() + b"\0":
            found = (found ^ byte) * 0x100000001B3 % 2**64
    return f"{found:016x}"


def record(lm, data, wanted, limit):
    manager, found = TaskManager(), {}
    figures = lambda row: {k: v for k, v in row.items() if k.split(",")[0] in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "perplexity")}
    with tempfile.TemporaryDirectory() as scratch:
        for name, num_fewshot in wanted:
            task = tasks_of(manager, data, name, num_fewshot, scratch)
            out = evaluator.simple_evaluate(lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=100, log_samples=True)
            for part, samples in out["samples"].items():
                samples.sort(key=lambda s: s["doc_id"])
                found[f"{part}@{num_fewshot}"] = {
                    "results": figures(out["results"][part]),
                    "prompts": [fingerprint(s["arguments"]) for s in samples],
                    "samples": [[[float(r[0]), bool(r[1])] for r in s["filtered_resps"]] for s in samples]}
            if name in out.get("groups", {}):
                found[f"{name}@{num_fewshot}"] = {"results": figures(out["groups"][name])}
            print(name, num_fewshot, figures(out["results"][name]))
    return found


def main():
    torch.manual_seed(0)
    data = HERE / "data"
    own = [(n, 0) for n in NAMED] + [("mmlu", 5), ("race", 1)]

    def llama(folder, max_length=None):
        return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=max_length)

    if len(sys.argv) > 1:
        shared = Path(sys.argv[1])
        sys.path.insert(0, str(shared / "tools"))
        import zebra_torch as z

        def hybrid(folder, tokenizer, max_length=None):
            c, hc = (json.loads((folder / n).read_text()) for n in ("config.json", "hybrid_config.json"))
            lm = z.LM(c, [(z.MLA if i in hc["mla_layers"] else z.Mamba2)(hc) for i in range(c["num_hidden_layers"])])
            lm.load_state_dict(z.load(folder / "model.safetensors"))
            return Peer(pretrained=str(tokenizer), dtype="float32", device="cpu", batch_size=4, max_length=max_length).attach(lm.eval())

        with tempfile.TemporaryDirectory() as scratch:
            zebroid = lambda *args: subprocess.run(["cargo", "run", "--release", "--quiet", "--", *args], cwd=ROOT, check=True)
            zebroid("compose", "assets/teacher", f"{scratch}/own", *HYBRID)
            zebroid("export", f"{scratch}/own", f"{scratch}/amd", "--format", "amd")
            amd = Path(scratch) / "amd"
            write("embedded-hybrid", record(hybrid(amd, ROOT / "assets/teacher"), data, own, None))
            write("embedded-hybrid-fewshot", record(hybrid(amd, ROOT / "assets/teacher", LONG), data, FEWSHOT, None))
        real = [(n, 0) for n in NAMED if n != "race" and not n.startswith("truthfulqa")]
        teacher, golden = shared / "teachers/stories260K", shared / "golden/zebra-2mla3m2"
        for name, lm in [("stories260K", llama(teacher)), ("zebra-2mla3m2", hybrid(golden, teacher))]:
            write(f"shared-{name}", record(lm, shared / "data/eval", real, 3))
        for name, lm in [("stories260K", llama(teacher, LONG)), ("zebra-2mla3m2", hybrid(golden, teacher, LONG))]:
            write(f"shared-{name}-fewshot", record(lm, shared / "data/eval", [("mmlu", 5), ("lambada_openai", 5)], 1))
        return
    for name, lines in documents().items():
        path = data / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    parquet(data, {"arc_easy_test": "ARC-Easy/test", "arc_easy_train": "ARC-Easy/train", "mmlu_test": "all/test",
                   "blimp/anaphor_number_agreement": "anaphor_number_agreement/train", "blimp/wh_island": "wh_island/train"})
    write("embedded", record(llama(ROOT / "assets/teacher"), data, own, None))
    write("embedded-fewshot", record(llama(ROOT / "assets/teacher", LONG), data, FEWSHOT, None))


def parquet(data, splits):
    """The hub's layout: hub/CONFIG/SPLIT/0000.parquet."""
    for name, place in splits.items():
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        path = HERE / "hub" / place / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write(name, found):
    (HERE / "recorded").mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(part)}: {json.dumps(of)}" for part, of in found.items())
    (HERE / "recorded" / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
