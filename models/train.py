"""Train all models anew: `python -m models.train`, about 22 minutes on one core."""

from __future__ import annotations

from models import charlm, digits, frozen, ranker, sums, towers

if __name__ == "__main__":
    digits.main()
    frozen.main()
    ranker.main()
    sums.main()
    towers.main()
    charlm.main()
