"""How models write calls of tools, and what they think before they answer: one small file a kind of syntax."""
