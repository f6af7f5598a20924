//! The batch sizes for which a decode step is captured as a graph. A step takes the graph of the next size up; rows that pad
//! it are skipped by the kernels that read weights of experts, states or latents, so the steps of the ladder can be wide.

/// Sizes from 1 up to `most` rows: powers of two and one and a half times them, and `most` itself.
pub fn ladder(most: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> = Vec::new();
    let mut size = 1;
    while size < most {
        sizes.push(size);
        if size > 1 && size + size / 2 < most {
            sizes.push(size + size / 2);
        }
        size *= 2;
    }
    if most > 0 {
        sizes.push(most);
    }
    sizes
}

/// The ladder's size for a step of `rows` rows, or none where it is too large.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn rung(ladder: &[usize], rows: usize) -> Option<usize> {
    ladder.iter().copied().find(|&size| size >= rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_ascend_to_the_most() {
        assert_eq!(ladder(0), Vec::<usize>::new());
        assert_eq!(ladder(1), [1]);
        assert_eq!(ladder(2), [1, 2]);
        assert_eq!(ladder(20), [1, 2, 3, 4, 6, 8, 12, 16, 20]);
        assert_eq!(ladder(256).len(), 16);
        for most in 1..300 {
            assert!(ladder(most).windows(2).all(|pair| pair[0] < pair[1]), "{most}");
        }
    }

    #[test]
    fn a_step_takes_the_next_size_up() {
        let sizes = ladder(20);
        assert_eq!([1, 3, 5, 17, 20].map(|rows| rung(&sizes, rows)), [1, 3, 6, 20, 20].map(Some));
        assert_eq!(rung(&sizes, 21), None);
    }
}
