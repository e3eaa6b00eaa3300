"""Many prompts in one batch, results in order, best guesses scored. Usage: python batch.py [MODEL]"""

import sys

from tramontane import LLM

COUNTRIES = ["France", "Italy", "Spain", "Greece"]

with LLM(sys.argv[1] if len(sys.argv) > 1 else None, temperature=0) as llm:
    prompts = [f"The capital of {country} is" for country in COUNTRIES]
    for prompt, result in zip(prompts, llm.generate(prompts, max_tokens=12, stop=["."]), strict=True):
        print(f"{prompt}{result.text}.")

    sentences = ["The tramontane is a cold wind.", "The tramontane is a blue wheel."]
    for sentence, score in zip(sentences, llm.score(sentences), strict=True):
        print(f"{score.perplexity:8.1f}  {sentence}")
    print(llm.stats())
