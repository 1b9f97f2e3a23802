//! Memory as a picture: a grid of cells, each some bytes of memory, row by row.

use std::ops::Range;

use mte::{GRANULE_SIZE, Tag, TagPage};

use crate::error::Result;
use crate::view::{Gap, PAGE, Part, View};

const GRANULE: u64 = GRANULE_SIZE as u64;

/// What a cell shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Nothing of the guest's memory.
    NoMemory,
    /// Memory that was never populated.
    Hole,
    /// The tag other than 0 that most of its granules have, or 0 if all have that.
    Tag(Tag),
}

/// How many granules of a cell have each tag, none if no page of it is populated, and whether there is a hole in it.
#[derive(Clone, Copy, Default)]
struct Tally {
    granules: [u32; Tag::COUNT],
    hole: bool,
}

impl Tally {
    fn add(&mut self, tag: Tag, granules: u32) {
        let sum = &mut self.granules[usize::from(tag.value())];
        *sum = sum.saturating_add(granules);
    }

    fn cell(&self) -> Cell {
        let frequent = Tag::all().skip(1).rev();
        let frequent = frequent.max_by_key(|tag| self.granules[usize::from(tag.value())]);
        match frequent {
            Some(tag) if self.granules[usize::from(tag.value())] > 0 => Cell::Tag(tag),
            _ if self.granules[0] > 0 => Cell::Tag(Tag::ZERO),
            _ if self.hole => Cell::Hole,
            _ => Cell::NoMemory,
        }
    }
}

/// How many granules of a page have each tag. Bytes are counted first, each of which has two of them: that is half the work.
fn frequencies(tags: &TagPage) -> [u32; Tag::COUNT] {
    // A page has 128 of them, so that no count and no sum is more than a byte holds.
    let mut bytes = [[0u8; Tag::COUNT]; Tag::COUNT];
    for byte in tags.as_packed() {
        bytes[usize::from(byte >> 4)][usize::from(byte & 0xf)] += 1;
    }
    let mut low = [0u8; Tag::COUNT];
    for row in &bytes {
        for (sum, count) in low.iter_mut().zip(row) {
            *sum += count;
        }
    }
    let high = bytes.map(|row| row.iter().sum::<u8>());
    std::array::from_fn(|tag| u32::from(low[tag]) + u32::from(high[tag]))
}

/// Memory, row by row, from the upper left on.
pub struct Grid {
    /// The first byte of the first cell: the range's, or somewhat before.
    start: u64,
    /// Bytes of a cell: a power of two.
    cell_bytes: u64,
    width: usize,
    tallies: Vec<Tally>,
}

impl Grid {
    /// The range in rows of `width` cells, a power of two, and at most `max_height` of them. Cells are as small as that
    /// allows. Pages that the range cuts are seen as far as there are cells.
    ///
    /// # Errors
    /// [`crate::Error::NoTags`]; whatever keeps the memory from being read.
    pub fn of(view: &mut View<'_>, width: usize, max_height: usize) -> Result<Self> {
        view.must_have_tags()?;
        let range = view.range();
        let width = width.max(1).next_power_of_two();
        let mut grid = Self::laid_out(&range, width, max_height.max(2));
        view.visit_tags(&mut |part| {
            grid.add(part);
            Ok(())
        })?;
        Ok(grid)
    }

    fn laid_out(range: &Range<u64>, width: usize, max_height: usize) -> Self {
        // One row is kept for what aligning the first one costs.
        let cells = width as u64 * (max_height as u64 - 1);
        let cell_bytes = (range.end - range.start)
            .div_ceil(cells)
            .checked_next_power_of_two()
            .unwrap_or(1 << 63)
            .max(GRANULE);
        let row_bytes = cell_bytes.saturating_mul(width as u64);
        let start = range.start / row_bytes * row_bytes;
        let rows = (range.end - start).div_ceil(row_bytes) as usize;
        Self {
            start,
            cell_bytes,
            width,
            tallies: vec![Tally::default(); rows * width],
        }
    }

    /// Bytes of a cell.
    pub const fn cell_bytes(&self) -> u64 {
        self.cell_bytes
    }

    /// Bytes of a row.
    pub const fn row_bytes(&self) -> u64 {
        self.cell_bytes * self.width as u64
    }

    /// Cells of a row.
    pub const fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub const fn height(&self) -> usize {
        self.tallies.len() / self.width
    }

    /// The first byte of a row.
    pub const fn row_start(&self, row: usize) -> u64 {
        self.start
            .saturating_add(self.row_bytes().saturating_mul(row as u64))
    }

    /// A cell; nothing below the last row.
    pub fn cell(&self, column: usize, row: usize) -> Cell {
        let tally = self.tallies.get(row * self.width + column);
        tally.map_or(Cell::NoMemory, Tally::cell)
    }

    fn at(&mut self, address: u64) -> Option<&mut Tally> {
        let number = address.checked_sub(self.start)? / self.cell_bytes;
        self.tallies.get_mut(number as usize)
    }

    fn add(&mut self, part: Part<'_>) {
        match part {
            Part::Pages { address, tags, .. } => {
                for (tags, page) in tags.iter().zip(0..) {
                    self.add_page(address + page * PAGE, tags);
                }
            }
            Part::Gap(range, Gap::Hole) => self.add_hole(range),
            Part::Gap(_, Gap::NoMemory | Gap::Unmapped) => {}
        }
    }

    fn add_page(&mut self, address: u64, tags: &TagPage) {
        let granules = (self.cell_bytes / GRANULE).min(PAGE / GRANULE);
        if let Some(tag) = tags.uniform() {
            for cell in
                (address..address.saturating_add(PAGE)).step_by((granules * GRANULE) as usize)
            {
                if let Some(tally) = self.at(cell) {
                    tally.add(tag, granules as u32);
                }
            }
            return;
        }
        if granules == PAGE / GRANULE {
            if let Some(tally) = self.at(address) {
                for (tag, count) in Tag::all().zip(frequencies(tags)) {
                    tally.add(tag, count);
                }
            }
            return;
        }
        let tags = tags.unpack();
        for (cell, tags) in (0..).zip(tags.chunks(granules as usize)) {
            if let Some(tally) = self.at(address + cell * granules * GRANULE) {
                for tag in tags {
                    tally.add(Tag::from_low_bits(*tag), 1);
                }
            }
        }
    }

    fn add_hole(&mut self, range: Range<u64>) {
        let mut at = range.start.max(self.start);
        while at < range.end {
            let Some(tally) = self.at(at) else { return };
            tally.hole = true;
            at = (at / self.cell_bytes * self.cell_bytes).saturating_add(self.cell_bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_granule_of_a_page_counts_once() {
        let mut of_granules = [3; 256];
        of_granules[7] = 9;
        of_granules[8] = 9;
        of_granules[255] = 15;
        let mut expected = [0; Tag::COUNT];
        (expected[3], expected[9], expected[15]) = (253, 2, 1);

        assert_eq!(frequencies(&TagPage::pack(&of_granules)), expected);
        assert_eq!(frequencies(&TagPage::ZERO)[0], 256);
    }
}
