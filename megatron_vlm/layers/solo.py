"""A group of one rank, for parts that run whole on every rank; read where megatron-core is not."""


class SoloGroup:
    """Stands for a tensor parallel group of this rank alone: modules built with it hold full, replicated weights."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0
