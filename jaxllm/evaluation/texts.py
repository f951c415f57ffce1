"""Measures of written texts: sacrebleu's and rouge-score's."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.evaluation.labels import Measures

_ROUGE = ("rouge1", "rouge2", "rougeL")


def measure_texts(written: Sequence[str], references: Sequence[str]) -> Measures:
    """BLEU (Papineni et al., 2002) and chrF (Popović, 2015) of the corpus, 0 to 100; ROUGE (Lin, 2004), the mean F1, 0 to 1.

    written, references: one of each for every example.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(_ROUGE)
    scores = [scorer.score(reference, text) for reference, text in zip(references, written, strict=True)]
    values = {
        "bleu": sacrebleu.corpus_bleu(list(written), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(written), [list(references)]).score,
        **{name: sum(score[name].fmeasure for score in scores) / max(len(scores), 1) for name in _ROUGE},
    }
    return Measures(len(written), {name: float(value) for name, value in values.items()})
