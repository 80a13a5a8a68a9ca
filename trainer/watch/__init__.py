"""What a run shows of itself: metrics, boards, rates, where its time went."""
