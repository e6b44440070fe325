"""Samples for toy models, shared by the tests of training and the programs they start."""

import torch

SETTINGS = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def make_samples(count, seed=0):
    """Samples of mixed lengths, some of them without speech, as dictionaries."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=generator)

    samples = []
    for index in range(count):
        length = int(draw(8, 24, 1))
        ids, codes = draw(40, 320, length), draw(0, 32, 8, length)
        labels, audio_labels = ids.clone(), codes.clone()
        labels[: length // 2] = -100
        audio_labels[:, : length // 3] = -100
        audio_labels[3, : length // 2] = -100
        if index % 3 == 0:
            audio_labels[:] = -100
        samples.append(
            {
                "input_ids": ids,
                "labels": labels,
                "audio_codes": codes,
                "audio_labels": audio_labels,
                "row_ids": torch.tensor(index),
            }
        )
    return samples


def collate(samples):
    length = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": 0, "labels": -100, "audio_codes": 33, "audio_labels": -100}
    batch = {
        name: torch.stack(
            [torch.nn.functional.pad(s[name], (0, length - s[name].shape[-1]), value=value) for s in samples]
        )
        for name, value in fill.items()
    }
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch["row_ids"] = torch.stack([sample["row_ids"] for sample in samples])
    return {**batch, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}
