//! Recall (stub until stories land).
