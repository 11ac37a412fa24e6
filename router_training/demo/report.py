"""CARD.md: how a bundle was made, what it can do, and how well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from router_training.demo.manifest import Manifest
from router_training.demo.tasks import TASKS

FILE = "CARD.md"

_TEXT = """\
# The demo's models

A small base in 4-bit NF4, one LoRA adapter (rank 8, all seven projections) a task, and a router.
All of it is synthetic and made from seeds, without any outside data, by

    python -m router_training demo --out DIR --seed {seed}

It shows the machinery of mora-serve and is good for nothing else: the models know the tasks below,
on operands in single quotes, and no language.

- **Base**: Llama shape, 4 layers, hidden 128, 0.9 million parameters, one token a byte, 512
  positions, pre-trained on tasks named by codes (`#A 'kavo'`) among random words, pairs of codes
  included, and on echoing the operand where there is no code. It has seen no paraphrase.
- **Prompts**: plain text becomes `<|begin|><|user|>TEXT<|assistant|>`; a chat of one user turn
  gives the same tokens. A system turn is tolerated at some cost (2.5 % of the training rows had
  one) and steers nothing. Of a longer chat the template keeps the last user turn alone: an operand
  of an earlier turn would mislead the model.
- **Adapters**: trained in one batched pass, each on paraphrases of its task, 20 and more a task,
  a fifth of which is kept for testing.
- **Router**: fitted on the known tasks only; the held-out ones ({held_out}) are told to it by
  the example prompts on their cards, as any adapter registered later is.

## Measured

Again, without training, on any seed: `python -m router_training evaluate DIR`. Figures are shares
of {prompts} prompts a task whose whole greedily generated answer is right (seed {eval_seed}, not
used in fitting; operands of `roman` and `successor` are few, so some of them recur).

| task | what it does | new prompts | new paraphrases | base alone | router's fitting |
|---|---|---|---|---|---|
{rows}
| **mean** | | **{new:.3f}** | **{held:.3f}** | **{base:.3f}** | |

New paraphrases after a system turn: **{system:.3f}** in the mean.

The router, with all adapters registered, on {prompts} prompts a task in kept paraphrases and
{outside} prompts of no task, from generators that no fitting has used:

| | known tasks | held-out tasks |
|---|---|---|
| the right adapter scores best | **{known_top1:.3f}** | **{held_out_top1:.3f}** |
| exactly the right adapter runs | {known_alone:.3f} | {held_out_alone:.3f} |

Of the tasks' prompts {abstained:.3f} get the base, of the prompts of no task
{out_of_domain_accepted:.3f} an adapter; the score behind that has an AUROC of
**{out_of_domain_auroc:.3f}**.

`examples.json` holds what `mora-serve demo` shows. It was chosen among prompts that the models
route and answer rightly, so it says what they can do; the table says how often.

Size: {size:.1f} MB.
"""


def write_card(bundle: Path, manifest: Manifest, quality: dict[str, Any]) -> None:
    """Write CARD.md with the figures that ``evaluate`` gave."""
    rows = []
    for adapter in manifest.adapters:
        q = quality["tasks"][adapter.name]
        rows.append(
            f"| {adapter.name} | {TASKS[adapter.tasks[0]].description} | {q['new_prompts']:.2f} "
            f"| {q['new_templates']:.2f} | {q['base']:.2f} | {adapter.router} |"
        )
    text = _TEXT.format(
        seed=manifest.seed,
        held_out=", ".join(a.name for a in manifest.adapters if a.router == "held-out"),
        prompts=quality["prompts_a_task"],
        eval_seed=quality["seed"],
        rows="\n".join(rows),
        new=quality["new_prompts_mean"],
        held=quality["new_templates_mean"],
        base=quality["base_mean"],
        system=quality["system_turn_mean"],
        outside=8 * quality["prompts_a_task"],
        **quality["router"],
        size=quality["bytes"] / 1e6,
    )
    (bundle / FILE).write_text(text)
