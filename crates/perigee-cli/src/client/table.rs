//! Columns for people: as wide as their widest cell, numbers to the right.

/// Rows of text under headings; columns that start with a digit in every row are aligned to the right.
pub(crate) fn render(headings: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
    let layout: Vec<(usize, bool)> = headings
        .iter()
        .enumerate()
        .map(|(column, heading)| {
            let cells = || rows.iter().map(|row| cell(row, column));
            let width = cells().map(|text| text.chars().count()).chain([heading.chars().count()]).max();
            let numeric = !rows.is_empty() && cells().all(|text| text.starts_with(|c: char| c.is_ascii_digit()));
            (width.unwrap_or_default(), numeric)
        })
        .collect();
    let line = |texts: Vec<String>| {
        let padded: Vec<String> = texts
            .iter()
            .zip(&layout)
            .map(
                |(text, &(width, numeric))| if numeric { format!("{text:>width$}") } else { format!("{text:<width$}") },
            )
            .collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let heading = line(headings.iter().map(|heading| (*heading).to_owned()).collect());
    let body = rows.iter().map(|row| line((0..headings.len()).map(|column| cell(row, column)).collect()));
    std::iter::once(heading).chain(body).collect()
}

#[cfg(test)]
mod tests {
    use super::render;

    #[test]
    fn columns_are_as_wide_as_needed_and_numbers_stand_right() {
        let rows = [vec!["a".to_owned(), "5".to_owned()], vec!["longer".to_owned(), "1234".to_owned()]];
        assert_eq!(render(&["NAME", "N"], &rows), "NAME       N\na          5\nlonger  1234\n");
        assert_eq!(render(&["NAME", "N"], &[]), "NAME  N\n");
    }
}
