//! Two texts line by line, as `diff -u` shows them.

/// Lines that stay the same before and after each change.
const CONTEXT: usize = 3;
/// A middle part of more comparisons than this is shown as replaced on the whole.
const COMPARISONS_MAX: usize = 16_000_000;

/// One line, and in which of the texts it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    Both(&'a str),
    Old(&'a str),
    New(&'a str),
}

/// What differs, with a little of what does not; `...` stands for the rest. Empty when the texts are equal.
pub(crate) fn unified(old: &str, new: &str) -> Vec<String> {
    let lines = compare(&old.lines().collect::<Vec<_>>(), &new.lines().collect::<Vec<_>>());
    let changed: Vec<usize> =
        (0..lines.len()).filter(|number| !matches!(lines[*number], Line::Both(_))).collect();
    let near = |number: usize| changed.iter().any(|change| change.abs_diff(number) <= CONTEXT);
    let (mut out, mut skipped) = (Vec::new(), false);
    for (number, line) in lines.iter().enumerate() {
        if !near(number) {
            skipped = true;
            continue;
        }
        if std::mem::take(&mut skipped) {
            out.push("...".to_owned());
        }
        out.push(match line {
            Line::Both(text) => format!(" {text}"),
            Line::Old(text) => format!("-{text}"),
            Line::New(text) => format!("+{text}"),
        });
    }
    out
}

/// The lines of both in order; as many as can be are in both.
fn compare<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<Line<'a>> {
    let begin = old.iter().zip(new).take_while(|(old, new)| old == new).count();
    let rest = old.len().min(new.len()) - begin;
    let end = old.iter().rev().zip(new.iter().rev()).take(rest).take_while(|(old, new)| old == new).count();
    let (old_middle, new_middle) = (&old[begin..old.len() - end], &new[begin..new.len() - end]);
    let both = |lines: &[&'a str]| lines.iter().map(|line| Line::Both(line)).collect::<Vec<_>>();
    [both(&old[..begin]), compare_middle(old_middle, new_middle), both(&old[old.len() - end..])].concat()
}

fn compare_middle<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<Line<'a>> {
    if old.len().saturating_mul(new.len()) > COMPARISONS_MAX {
        let replaced = old.iter().map(|line| Line::Old(line));
        return replaced.chain(new.iter().map(|line| Line::New(line))).collect();
    }
    let common = common_lengths(old, new);
    let (mut at, mut lines) = ((0, 0), Vec::new());
    while at.0 < old.len() || at.1 < new.len() {
        let (row, column) = at;
        if row < old.len() && column < new.len() && old[row] == new[column] {
            lines.push(Line::Both(old[row]));
            at = (row + 1, column + 1);
        } else if column == new.len()
            || (row < old.len() && common[row + 1][column] >= common[row][column + 1])
        {
            lines.push(Line::Old(old[row]));
            at.0 += 1;
        } else {
            lines.push(Line::New(new[column]));
            at.1 += 1;
        }
    }
    lines
}

/// At each pair of places: how many lines the longest common subsequence of the rests has.
fn common_lengths(old: &[&str], new: &[&str]) -> Vec<Vec<u32>> {
    let mut common = vec![vec![0; new.len() + 1]; old.len() + 1];
    for row in (0..old.len()).rev() {
        for column in (0..new.len()).rev() {
            common[row][column] = if old[row] == new[column] {
                common[row + 1][column + 1] + 1
            } else {
                common[row + 1][column].max(common[row][column + 1])
            };
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_do_not_differ() {
        assert_eq!(unified("a\nb\n", "a\nb\n"), Vec::<String>::new());
        assert_eq!(unified("", ""), Vec::<String>::new());
    }

    #[test]
    fn what_differs_is_shown_with_three_lines_around_it() {
        let old = "1\n2\n3\n4\n5\nold\n7\n8\n9\n10\n11\n12\n13\n14\n";
        let new = "1\n2\n3\n4\n5\nnew\n7\n8\n9\n10\n11\n12\n13\n14\nend\n";
        let shown =
            ["...", " 3", " 4", " 5", "-old", "+new", " 7", " 8", " 9", "...", " 12", " 13", " 14", "+end"];
        assert_eq!(unified(old, new), shown);
        assert_eq!(unified("", "a\n"), ["+a"]);
        assert_eq!(unified("a\nb\na\n", "a\n"), [" a", "-b", "-a"]);
    }

    #[test]
    fn both_sides_give_back_their_texts_and_the_longest_common_part_stays() {
        let (old, new) = (["a", "b", "c", "a", "b", "b", "a"], ["c", "b", "a", "b", "a", "c"]);
        let lines = compare(&old, &new);
        let side = |other: fn(&Line<'_>) -> bool| -> Vec<&str> {
            let text = |line: &Line<'static>| match *line {
                Line::Both(text) | Line::Old(text) | Line::New(text) => text,
            };
            lines.iter().filter(|line| !other(line)).map(text).collect()
        };
        assert_eq!(side(|line| matches!(line, Line::New(_))), old);
        assert_eq!(side(|line| matches!(line, Line::Old(_))), new);
        assert_eq!(lines.iter().filter(|line| matches!(line, Line::Both(_))).count(), 4);
    }
}
