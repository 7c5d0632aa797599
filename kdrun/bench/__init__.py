"""Speed and memory as ratios that anyone can measure again: each a pair, in one run, several times in turn."""
