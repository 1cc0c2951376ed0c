"""Soft-TIFA, the measure of GenEval 2 (Kamath et al. 2025), as a sidecar: how likely a VLM answers each question as it should.

GenEval 2's prompts and questions are CC BY-NC 4.0 and are not part of fewstep: fetch them, and make a protocol of them as
docs/sidecars.md shows. This script is our own writing of the published idea, and serves any list of questions: facts hold
"vqa_list", [[question, answer], ...], where answers are "Yes" or, to "How many ...", a number in words.

NOT RUN by fewstep's authors, who have no such environment. Qwen3-VL-8B-Instruct (Apache-2.0) wants a GPU of 24 GB.

    python3.11 -m venv envs/geneval2
    envs/geneval2/bin/pip install torch torchvision transformers==4.57.0 accelerate pillow
    envs/geneval2/bin/python examples/sidecars/geneval2.py --download
"""

import argparse
import math

from speaking import offline, serve

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LEAST = 1e-9  # a probability of 0 would make a geometric mean 0 whatever else was right


def wordings(question, answer):
    """The ways of writing the right answer whose probabilities count."""
    words = {"yes"}
    if question.startswith("How many"):
        words = {answer.lower(), str(NUMBERS.index(answer.lower()))} if answer.lower() in NUMBERS else {answer.lower()}
    spelt = {form for word in words for form in (word, word.capitalize())}
    return sorted(spelt | {" " + form for form in spelt})


def means(probabilities):
    """Arithmetic and geometric mean of the probabilities of right answers."""
    logarithms = [math.log(max(p, LEAST)) for p in probabilities]
    return sum(probabilities) / len(probabilities), math.exp(sum(logarithms) / len(logarithms))


def opened(name):
    """Load the VLM; returns the answer to a request."""
    import torch
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(name)
    model = Qwen3VLForConditionalGeneration.from_pretrained(name, dtype="auto", device_map="auto").eval()

    @torch.no_grad()
    def probability(file, question, answer):
        words = [{"type": "image", "image": file}, {"type": "text", "text": question + " Answer in one word."}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": words}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        likely = model(**inputs).logits[0, -1].float().softmax(-1)
        first = {processor.tokenizer.encode(form, add_special_tokens=False)[0] for form in wordings(question, answer)}
        return float(likely[sorted(first)].sum())

    def answer(asked):
        atoms = [probability(asked["file"], question, right) for question, right in asked["facts"]["vqa_list"]]
        arithmetic, geometric = means(atoms)
        return {"score": geometric, "arithmetic": arithmetic, "atoms": atoms}

    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Soft-TIFA as a sidecar of fewstep")
    parser.add_argument("--model", default="Qwen/Qwen3-VL-8B-Instruct", help="hub id or folder")
    parser.add_argument("--download", action="store_true", help="let it fetch the model (18 GB) from the hub")
    chosen = parser.parse_args()
    offline(chosen.download)
    serve(
        "geneval2",
        "1",
        ["file", "facts"],
        lambda: opened(chosen.model),
        ["transformers", "torch"],
        "pip install torch torchvision transformers==4.57.0 accelerate pillow",
        weights=chosen.model,
    )
