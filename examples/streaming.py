"""Print an answer while it is written, then once more from coroutines. Usage: python streaming.py [MODEL]"""

import asyncio
import sys

from tramontane import LLM, AsyncLLM

QUESTION = [{"role": "user", "content": "Why does the wind blow?"}]


async def ask(llm: AsyncLLM) -> None:
    async for chunk in llm.stream(QUESTION, max_tokens=96, seed=1):
        print(chunk.text, end="", flush=True)
    print()


with LLM(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
    for chunk in llm.stream(QUESTION, max_tokens=96, temperature=0):
        print(chunk.text, end="", flush=True)
    print("\n---")
    asyncio.run(ask(AsyncLLM.from_backend(llm.backend)))  # the same loaded model
