//! The curve's promises, over grids of any sides.

use proptest::prelude::*;

use super::*;

fn order_of(sides: &[usize]) -> HilbertOrder {
    HilbertOrder::new(sides).unwrap()
}

/// How far a step goes along each axis.
fn steps(order: &HilbertOrder) -> Vec<Vec<usize>> {
    let at: Vec<Vec<usize>> = order
        .order()
        .into_iter()
        .map(|cell| order.coordinates(cell))
        .collect();
    at.windows(2)
        .map(|pair| {
            let axes = pair[0].iter().zip(&pair[1]);
            axes.map(|(from, to)| from.abs_diff(*to)).collect()
        })
        .collect()
}

fn diagonals(order: &HilbertOrder) -> usize {
    let diagonal = |step: &&Vec<usize>| step.iter().sum::<usize>() != 1;
    steps(order).iter().filter(diagonal).count()
}

fn any_grid() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        prop::collection::vec(1_usize..40, 2),
        prop::collection::vec(1_usize..14, 3),
    ]
}

proptest! {
    #[test]
    fn every_cell_has_one_position_and_the_inverse_finds_it(sides in any_grid()) {
        let order = order_of(&sides);
        let (cells, inverse) = (order.order(), order.inverse());
        prop_assert_eq!(cells.len(), order.length());
        for (position, &cell) in cells.iter().enumerate() {
            prop_assert_eq!(inverse[cell], position);
        }
        prop_assert_eq!(cells[0], 0);
    }

    #[test]
    fn even_sides_need_no_diagonal_step(sides in any_grid()) {
        let doubled: Vec<usize> = sides.iter().map(|side| side.div_ceil(2) * 2).collect();
        prop_assert_eq!(diagonals(&order_of(&doubled)), 0);
    }

    #[test]
    fn no_step_is_longer_than_one_diagonal(sides in any_grid()) {
        let order = order_of(&sides);
        for step in steps(&order) {
            prop_assert!(step.iter().all(|&along| along <= 1) && step.iter().sum::<usize>() <= 2);
        }
        prop_assert!(sides.len() == 3 || diagonals(&order) <= 1);
    }

    #[test]
    fn a_part_is_that_of_the_whole(sides in any_grid(), start in 0_usize..2000, length in 0_usize..2000) {
        let order = order_of(&sides);
        let whole = order.order();
        let range = start.min(whole.len())..(start + length).min(whole.len());
        prop_assert_eq!(&order.cells(start..start + length), &whole[range]);
    }

    #[test]
    fn coordinates_are_those_of_rows_in_order(sides in any_grid(), cell in 0_usize..2000) {
        let order = order_of(&sides);
        let cell = cell % order.length();
        let coordinates = order.coordinates(cell);
        prop_assert!(coordinates.iter().zip(&sides).all(|(at, side)| at < side));
        let number = coordinates.iter().zip(&sides).fold(0, |number, (at, side)| number * side + at);
        prop_assert_eq!(number, cell);
    }
}

#[test]
fn four_by_four_is_hilberts_curve() {
    let expected = [0, 4, 5, 1, 2, 3, 7, 6, 10, 11, 15, 14, 13, 9, 8, 12];
    assert_eq!(order_of(&[4, 4]).order(), expected);
}

/// What makes a curve through neighbours Hilbert's: its quarters (eighths) fill those of the square (cube), at every scale.
#[test]
fn on_powers_of_two_aligned_runs_are_squares_and_cubes() {
    for (sides, sizes) in [(vec![32; 2], 1..5), (vec![16; 3], 1..4)] {
        let order = order_of(&sides);
        for size in sizes.map(|level| 1_usize << level) {
            for run in order.order().chunks(size.pow(sides.len() as u32)) {
                let square = |cell: &usize| -> Vec<usize> {
                    let coordinates = order.coordinates(*cell);
                    coordinates.into_iter().map(|at| at / size).collect()
                };
                assert!(run.iter().all(|cell| square(cell) == square(&run[0])));
            }
        }
    }
}

#[test]
fn a_part_of_a_grid_of_any_size_is_found_without_the_rest() {
    let order = order_of(&[1 << 20, 1 << 20]);
    let last = order.cells(order.length() - 2..usize::MAX);
    assert_eq!(last.len(), 2);
    let [before, at] = [last[0], last[1]].map(|cell| order.coordinates(cell));
    assert_eq!(before[0].abs_diff(at[0]) + before[1].abs_diff(at[1]), 1);
}

#[test]
fn grids_that_have_no_order_say_why() {
    let refused = |sides: &[usize]| HilbertOrder::new(sides).unwrap_err();
    for sides in [&[][..], &[4], &[2, 2, 2, 2]] {
        assert_eq!(refused(sides), GridError::Sides { got: sides.len() });
    }
    assert_eq!(refused(&[3, 0]), GridError::EmptySide { side: 1 });
    for sides in [vec![1 << 20, (1 << 20) + 1], vec![usize::MAX; 3]] {
        assert_eq!(
            refused(&sides),
            GridError::TooManyCells {
                sides: sides.clone()
            }
        );
    }
}

#[test]
fn stored_sides_are_checked_when_they_are_read() {
    let order = order_of(&[3, 5]);
    let stored = serde_json::to_string(&order).unwrap();
    assert_eq!(stored, "[3,5]");
    assert_eq!(
        serde_json::from_str::<HilbertOrder>(&stored).unwrap(),
        order
    );
    assert!(serde_json::from_str::<HilbertOrder>("[3,0]").is_err());
}
