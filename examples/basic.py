"""Ask a model a question. Usage: python basic.py [MODEL]"""

import sys

from tramontane import LLM

with LLM(sys.argv[1] if len(sys.argv) > 1 else None, temperature=0) as llm:
    result = llm.chat([{"role": "user", "content": "What is the capital of Japan?"}], max_tokens=64)
    print(result.text)
    print(f"{result.usage.prompt_tokens} tokens read, {result.usage.completion_tokens} written: {result.finish_reason}")
