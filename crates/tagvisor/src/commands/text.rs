//! Figures and tables for people.

use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};

/// `1.50 GiB`.
pub fn bytes(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// `1,048,576`.
pub fn count(count: u64) -> String {
    HumanCount(count).to_string()
}

/// `2.41 s`, `13.2 ms` or `870 µs`.
pub fn microseconds(us: u64) -> String {
    let seconds = Duration::from_micros(us).as_secs_f64();
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.2} s"),
    }
}

/// Rows whose columns begin below one another.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default()
    };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            line += &format!("{cell:<width$}  ", width = width(column));
        }
        text += line.trim_end();
        text += "\n";
    }
    text
}

/// A text that another process wrote, with what would move the cursor replaced.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_begin_below_one_another_and_lines_end_without_blanks() {
        let rows =
            [["NAME", "PID"], ["web", "4711"], ["database", ""]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), "NAME      PID\nweb       4711\ndatabase\n");
    }

    #[test]
    fn times_have_the_unit_that_fits_them() {
        assert_eq!(
            [0, 999, 1_000, 13_249, 2_405_000].map(microseconds),
            ["0 µs", "999 µs", "1.0 ms", "13.2 ms", "2.41 s"]
        );
    }

    #[test]
    fn what_would_move_a_cursor_is_replaced() {
        assert_eq!(printable("a\u{1b}[2Jb"), "a\u{fffd}[2Jb");
    }
}
