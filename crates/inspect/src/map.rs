//! Memory as a picture: a grid of cells, each some bytes of memory, row by row.

use std::ops::Range;

use mte::{GRANULE_SIZE, Tag, TagPage};

use crate::error::Result;
use crate::pairs::Pairs;
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
        let mut filling = Filling::of(&mut grid);
        view.visit_tags(&mut |part| {
            filling.add(part);
            Ok(())
        })?;
        filling.end_cell();
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

    /// Which cell an address is in, counted by rows, if it is in one.
    fn number(&self, address: u64) -> Option<usize> {
        let number = (address.checked_sub(self.start)? / self.cell_bytes) as usize;
        (number < self.tallies.len()).then_some(number)
    }
}

/// A grid that is being filled. Pages come mostly in the order of their addresses, so that those of one cell are counted together.
struct Filling<'a> {
    grid: &'a mut Grid,
    /// The cell that pages are counted for.
    cell: usize,
    /// What they have, which its tally has not yet.
    pairs: Pairs,
}

impl<'a> Filling<'a> {
    fn of(grid: &'a mut Grid) -> Self {
        Self {
            grid,
            cell: 0,
            pairs: Pairs::NONE,
        }
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
        if self.grid.cell_bytes < PAGE {
            self.add_page_of_cells(address, tags);
            return;
        }
        let Some(cell) = self.grid.number(address) else {
            return;
        };
        if cell != self.cell {
            self.end_cell();
            self.cell = cell;
        }
        match tags.uniform() {
            Some(tag) => self.pairs.add_uniform_page(tag),
            None => self.pairs.add_page(tags),
        }
    }

    /// A page that is several cells.
    fn add_page_of_cells(&mut self, address: u64, tags: &TagPage) {
        let bytes = self.grid.cell_bytes;
        let granules = (bytes / GRANULE) as usize;
        for (cell, tags) in (0..).zip(tags.unpack().chunks(granules)) {
            if let Some(number) = self.grid.number(address + cell * bytes) {
                for tag in tags {
                    self.grid.tallies[number].add(Tag::from_low_bits(*tag), 1);
                }
            }
        }
    }

    /// Adds what was counted to the cell's tally.
    fn end_cell(&mut self) {
        let tally = &mut self.grid.tallies[self.cell];
        for (tag, granules) in Tag::all().zip(self.pairs.granules()) {
            tally.add(tag, granules.try_into().unwrap_or(u32::MAX));
        }
        self.pairs = Pairs::NONE;
    }

    fn add_hole(&mut self, range: Range<u64>) {
        let mut at = range.start.max(self.grid.start);
        while at < range.end {
            let Some(number) = self.grid.number(at) else {
                return;
            };
            self.grid.tallies[number].hole = true;
            at = (at / self.grid.cell_bytes * self.grid.cell_bytes)
                .saturating_add(self.grid.cell_bytes);
        }
    }
}
