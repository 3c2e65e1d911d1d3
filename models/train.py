"""Train all models anew: `python -m models.train`, about four minutes on one core."""

from __future__ import annotations

from models import digits, ranker, towers

if __name__ == "__main__":
    digits.main()
    ranker.main()
    towers.main()
