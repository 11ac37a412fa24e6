"""CARD.md: how a bundle was made, what it can do, and how well."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from router_training.demo.headlines import HEADLINES
from router_training.demo.manifest import Manifest
from router_training.demo.tasks import TASKS
from router_training.report.write import write_report

FILE = "CARD.md"

_TEXT = """\
# The demo's models

A small base in 4-bit NF4, one LoRA adapter (rank 8, all seven projections) a task, and a router.
All of it is synthetic and made from seeds, without any outside data, by

    python -m router_training demo --out DIR --seed {seed}

It shows the machinery of mora-serve and is good for nothing else: the models know the tasks below,
on operands in single quotes, and no language.

- **Base**: Qwen3 shape (norms on queries and keys), 4 layers, hidden 128, 0.9 million parameters,
  one token a byte, 512 positions, pre-trained on tasks named by codes (`#A 'kavo'`) among random
  words, pairs of codes included, and on echoing the operand where there is no code. It has seen no
  paraphrase.
- **Prompts**: plain text becomes `<|begin|><|user|>TEXT<|assistant|>`; a chat of one user turn
  gives the same tokens. A system turn is tolerated at some cost (2.5 % of the training rows had
  one) and steers nothing. Of a longer chat the template keeps the last user turn alone: an operand
  of an earlier turn would mislead the model.
- **Adapters**: trained in one batched pass, half of the rows with one adapter and half with two, an
  operation and a style, both at weight 1; on paraphrases, 20 and more a task, a fifth of which is
  kept for testing. One style of every operation was never trained with it.
- **Router**: fitted on the known tasks only; the held-out ones ({held_out}) are told to it by
  the example prompts on their cards, as any adapter registered later is.

## Measured

Again, without training the models: `python -m router_training evaluate DIR`; with `--report FILE`
a page with pictures, and other ways to route beside this one. Figures are shares of {prompts}
prompts a task or pair whose whole greedily generated answer is right (seed {eval_seed}, not used in
fitting; operands of `roman` and `successor` are few, so some of them recur). New prompts are new
operands in templates of the training, new paraphrases are templates kept out of it.

| task | what it does | new prompts | new paraphrases | base alone | router's fitting |
|---|---|---|---|---|---|
{rows}
| **mean** | | **{new_prompts_mean:.3f}** | **{new_templates_mean:.3f}** | **{base_mean:.3f}** | |

New paraphrases after a system turn: **{system_turn_mean:.3f}** in the mean. Beside a wrong
adapter at weight 0.3 (as 30 % of the training's rows had one) the right one keeps
**{beside_wrong_kept:.3f}** of its exact match on new prompts.

Pairs, both adapters at weight 1:

| | new prompts | least pair | new paraphrases |
|---|---|---|---|
| trained together | **{pairs_trained_mean:.3f}** | {pairs_trained_least:.3f} \
| {pairs_new_templates_trained_mean:.3f} |
| never trained together | **{pairs_held_out_mean:.3f}** | {pairs_held_out_least:.3f} \
| {pairs_new_templates_held_out_mean:.3f} |

On {few} of the new prompts a pair the right two answer {right_pair:.3f}, the best single adapter
for each pair {best_single_mean:.3f}, all adapters {uniform:.3f}, two at random {random_pair:.3f}.
Three adapters at weight 1 at once, which no training had: {three_way:.3f}.

The router, with all adapters registered:

| | new prompts | new paraphrases |
|---|---|---|
| a known task's adapter scores best | **{known_top1_trained_templates:.3f}** | {known_top1:.3f} |
| it runs, and nothing else | {known_alone_trained_templates:.3f} | {known_alone:.3f} |
| both adapters of a pair run, and nothing else | {pairs_exactly_trained_templates:.3f} \
| {pairs_exactly:.3f} |
| right answers, routed over right adapter: tasks | **{routed_over_oracle_single:.3f}** \
| {routed_over_oracle_single_new_templates:.3f} |
| the same: pairs | **{routed_over_oracle_pairs:.3f}** \
| {routed_over_oracle_pairs_new_templates:.3f} |

An adapter that joins after the fitting with 16 example prompts scores best for
**{later_16_prompts:.3f}** of its new paraphrases (8 prompts: {later_8_prompts:.3f}, 4:
{later_4_prompts:.3f}; every adapter held out once). New sentences of which at least half of the
words are known go to the right adapter in {reworded_top1:.3f} of cases, others in
{new_words_top1:.3f}.

Of the tasks' new paraphrases {abstained:.3f} get the base. Prompts of no task get an adapter in
{out_of_domain_accepted:.3f} of cases, such as are worded like a task in {near_domain_accepted:.3f};
the score behind that has an AUROC of **{out_of_domain_auroc:.3f}** and **{near_domain_auroc:.3f}**.
The calibration error of the probabilities is **{calibration_error:.3f}**.

`examples.json` holds what `mora-serve demo` shows. It was chosen among prompts that the models
route and answer rightly, so it says what they can do; the table says how often.

Size: {size:.1f} MB.
"""


def write_page(file: Path, result: dict[str, Any]) -> None:
    """Write the evaluation's page with the figures that ``evaluate`` gave, baselines included."""
    made = (
        f"Made by python -m router_training evaluate on {platform.machine()}, Python "
        f"{platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}."
    )
    write_report(file, "The demo's adapters and router, measured", result, HEADLINES, made)


def write_card(bundle: Path, manifest: Manifest, quality: dict[str, Any]) -> None:
    """Write CARD.md with the figures that ``evaluate`` gave."""
    rows = []
    for adapter in manifest.adapters:
        q = quality["tasks"][adapter.name]
        rows.append(
            f"| {adapter.name} | {TASKS[adapter.tasks[0]].description} | {q['new_prompts']:.2f} "
            f"| {q['new_templates']:.2f} | {q['base']:.2f} | {adapter.router} |"
        )
    mixtures = quality["sections"]["quality"]["baselines"]
    text = _TEXT.format(
        seed=manifest.seed,
        held_out=", ".join(a.name for a in manifest.adapters if a.router == "held-out"),
        prompts=quality["prompts_a_task"],
        eval_seed=quality["seed"],
        rows="\n".join(rows),
        size=quality["bytes"] / 1e6,
        few=mixtures["prompts_a_pair"],
        right_pair=mixtures["right_pair"]["mean"],
        **quality["router"],
        **{k: v for k, v in quality.items() if isinstance(v, float)},
    )
    (bundle / FILE).write_text(text)
