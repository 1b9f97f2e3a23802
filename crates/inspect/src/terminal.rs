//! The picture in a terminal: two cells a character, one above the other, in colours; or a character a cell without.

use std::io::{self, Write};

use mte::Tag;

use crate::map::{Cell, Grid};
use crate::palette::{Colour, HOLE, colour_of, tag_colour};

/// What a terminal can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colours {
    /// All colours (24 bits).
    True,
    /// The 256 of xterm.
    Indexed,
    /// None: tags are hexadecimal digits.
    None,
}

impl Colours {
    fn foreground(self, colour: Colour) -> String {
        self.code(38, colour)
    }

    fn background(self, colour: Colour) -> String {
        self.code(48, colour)
    }

    fn code(self, ground: u8, colour: Colour) -> String {
        let [red, green, blue] = colour;
        match self {
            Self::True => format!("\x1b[{ground};2;{red};{green};{blue}m"),
            Self::Indexed => format!("\x1b[{ground};5;{}m", indexed(colour)),
            Self::None => String::new(),
        }
    }
}

/// The nearest of xterm's colours: a cube of six steps, or one of 24 greys.
fn indexed(colour: Colour) -> u8 {
    const STEPS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    let [red, green, blue] = colour;
    if red == green && green == blue && (8..=238).contains(&red) {
        return 232 + (red - 8) / 10;
    }
    let nearest = |value: u8| {
        let step = (0..6).min_by_key(|step| STEPS[usize::from(*step)].abs_diff(value));
        step.unwrap_or(0)
    };
    16 + 36 * nearest(red) + 6 * nearest(green) + nearest(blue)
}

/// Draws a grid, with the address of each line, and a legend.
///
/// # Errors
/// It cannot be written.
pub fn draw(grid: &Grid, colours: Colours, to: &mut impl Write) -> io::Result<()> {
    let rows_a_line = match colours {
        Colours::None => 1,
        Colours::True | Colours::Indexed => 2,
    };
    for row in (0..grid.height()).step_by(rows_a_line) {
        write!(to, "{:>#14x}  ", grid.row_start(row))?;
        match colours {
            Colours::None => draw_digits(grid, row, to)?,
            Colours::True | Colours::Indexed => draw_blocks(grid, row, colours, to)?,
        }
        writeln!(to)?;
    }
    legend(colours, to)
}

fn draw_digits(grid: &Grid, row: usize, to: &mut impl Write) -> io::Result<()> {
    let digit = |column| match grid.cell(column, row) {
        Cell::NoMemory => ' ',
        Cell::Hole => '.',
        Cell::Tag(tag) => char::from_digit(tag.value().into(), 16).unwrap_or('?'),
    };
    let line: String = (0..grid.width()).map(digit).collect();
    write!(to, "{}", line.trim_end())
}

fn draw_blocks(grid: &Grid, row: usize, colours: Colours, to: &mut impl Write) -> io::Result<()> {
    let mut before = None;
    for column in 0..grid.width() {
        let pair = [row, row + 1].map(|row| colour_of(grid.cell(column, row)));
        if before != Some(pair) {
            let [upper, lower] = pair;
            write!(
                to,
                "{}{}",
                colours.foreground(upper),
                colours.background(lower)
            )?;
            before = Some(pair);
        }
        write!(to, "▀")?;
    }
    write!(to, "\x1b[0m")
}

fn legend(colours: Colours, to: &mut impl Write) -> io::Result<()> {
    if colours == Colours::None {
        return writeln!(to, "{:16}0 untagged, 1 to f tags, . never populated", "");
    }
    write!(to, "{:16}", "")?;
    for tag in Tag::all() {
        write!(
            to,
            "{}  \x1b[0m {tag}  ",
            colours.background(tag_colour(tag))
        )?;
    }
    writeln!(to, "{}  \x1b[0m never populated", colours.background(HOLE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::palette::NO_MEMORY;

    #[test]
    fn tags_have_sixteen_different_colours_in_256_as_well() {
        let mut numbers: Vec<u8> = Tag::all().map(|tag| indexed(tag_colour(tag))).collect();
        numbers.extend([HOLE, NO_MEMORY].map(indexed));
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), Tag::COUNT + 2);
    }
}
