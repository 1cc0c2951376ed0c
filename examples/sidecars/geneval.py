"""GenEval's detector as a sidecar: Mask2Former (Swin-S) by mmdetection, colours by CLIP ViT-L/14 of open_clip.

Written from the interfaces of mmdet 2 and 3 and of open_clip; NOT RUN by fewstep's authors, who have no such environment. Check
it first: `fewstep doctor --eval --sidecar "..."`, then some images by eye. Another GPU has been seen to find nothing at all.

It follows github.com/djghosh13/geneval (MIT): objects above 0.3, at most 16 of a class, by falling confidence; colours of
objects cut out on grey (#999). Colours are read in float32, upstream uses automatic mixed precision.

    envs/geneval/bin/python examples/sidecars/geneval.py --config mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py
        --checkpoint mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth
"""

import argparse
import os

from speaking import offline, serve, sha256

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
WORDINGS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # GenEval's words for COCO's
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"  # another one is not called GenEval
CONFIDENT, MOST, GREY = 0.3, 16, "#999"


def objects_of(result, classes):
    """(class, score, box, mask or None) of everything that was detected, by either version of mmdet."""
    if hasattr(result, "pred_instances"):  # mmdet 3
        found = result.pred_instances.cpu().numpy()
        masks = found.masks if "masks" in found else [None] * len(found.scores)
        return [(classes[c], float(s), b[:4], m) for c, s, b, m in zip(found.labels, found.scores, found.bboxes, masks)]  # noqa: B905
    boxes, masks = result if isinstance(result, tuple) else (result, None)
    rows = [(c, i) for c in range(len(boxes)) for i in range(len(boxes[c]))]
    return [(classes[c], float(boxes[c][i][4]), boxes[c][i][:4], None if masks is None else masks[c][i]) for c, i in rows]


def opened(options):
    """Load both networks; returns the answer to a request."""
    import numpy as np
    import open_clip
    import torch
    from mmdet.apis import inference_detector, init_detector
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    detector = init_detector(options.config, options.checkpoint, device=device)
    names = detector.dataset_meta["classes"] if hasattr(detector, "dataset_meta") else detector.CLASSES
    classes = [RENAMED.get(name, name) for name in names]
    clip, _, prepare = open_clip.create_model_and_transforms("ViT-L-14", pretrained=options.clip, device=device)
    clip.eval()
    tokenizer, directions = open_clip.get_tokenizer("ViT-L-14"), {}

    def direction(name):
        if name not in directions:
            rows = []
            for colour in COLOURS:
                texts = tokenizer([w.format(colour=colour, name=name) for w in WORDINGS]).to(device)
                each = torch.nn.functional.normalize(clip.encode_text(texts), dim=-1)
                rows.append(torch.nn.functional.normalize(each.mean(0), dim=-1))
            directions[name] = torch.stack(rows)
        return directions[name]

    def colours(image, name, found):
        crops = []
        for _, _, box, mask in found:
            alone = image
            if mask is not None:
                shown = Image.fromarray(np.asarray(mask, dtype=bool))
                alone = Image.composite(image, Image.new("RGB", image.size, GREY), shown)
            crops.append(prepare(alone.crop(tuple(float(v) for v in box))))
        seen = clip.encode_image(torch.stack(crops).to(device))
        return [COLOURS[i] for i in (seen @ direction(name).T).argmax(-1).tolist()]

    @torch.no_grad()
    def answer(asked):
        found = [o for o in objects_of(inference_detector(detector, asked["file"]), classes) if o[1] > CONFIDENT]
        coloured = {item["class"] for item in asked["facts"].get("include", []) if "color" in item}
        image, detections = Image.open(asked["file"]).convert("RGB"), []
        for name in sorted({o[0] for o in found}):
            own = sorted((o for o in found if o[0] == name), key=lambda o: -o[1])[:MOST]
            read = colours(image, name, own) if name in coloured else [None] * len(own)
            for (_, score, box, _), colour in zip(own, read):  # noqa: B905
                one = {"class": name, "score": score, "box": [float(v) for v in box]}
                detections.append(one if colour is None else {**one, "color": colour})
        return {"detections": detections}

    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GenEval's detector as a sidecar of fewstep")
    parser.add_argument("--config", default=f"{DETECTOR}.py")
    parser.add_argument("--checkpoint", default=f"{DETECTOR}.pth")
    parser.add_argument("--clip", default="openai", help="a name that open_clip knows, or a file of weights")
    parser.add_argument("--download", action="store_true", help="let open_clip fetch its weights")
    chosen = parser.parse_args()
    offline(chosen.download)
    stem = os.path.splitext(os.path.basename(chosen.checkpoint))[0]
    serve(
        "geneval",
        "1",
        ["file", "facts"],
        lambda: opened(chosen),
        ["mmdet", "mmcv", "mmcv-full", "open_clip_torch", "torch"],
        "install mmdet and mmcv for your torch (mmdetection's Get started), then pip install open_clip_torch pillow",
        detector=DETECTOR if stem.startswith(DETECTOR) else stem,
        weights=sha256(chosen.checkpoint),
        colors=f"clip ViT-L/14 ({chosen.clip})",
    )
