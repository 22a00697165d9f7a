"""What every suite shares: problems, timing, checks, reports and pictures."""
