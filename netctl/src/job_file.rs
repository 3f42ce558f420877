//! The file of `netctl apply -f`: YAML documents, each a job.
//!
//! The whole file is read and checked before anything is sent, and an error names file, line and column.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
};

use scheduler_core::job::Job;

use crate::yaml::{self, Mark, Node, YamlError};

/// The most bytes that are read.
pub(crate) const FILE_LEN_MAX: u64 = 1024 * 1024;

/// Why a file is not a list of jobs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JobFileError {
    #[error("cannot read {file}")]
    Read { file: String, source: io::Error },
    #[error("{file} is larger than {FILE_LEN_MAX} bytes, which no job file is")]
    TooLarge { file: String },
    #[error("{file} holds no job; a job starts with `job: NAME`")]
    Empty { file: String },
    #[error("{}: {message}", Place { file, mark: *mark })]
    Content { file: String, mark: Option<Mark>, message: String },
}

/// Reads `path`, or standard input for `-`.
pub(crate) fn read(path: &Path) -> Result<Vec<Job>, JobFileError> {
    if path == Path::new("-") {
        return parse("<stdin>", &bounded("<stdin>", &mut io::stdin().lock())?);
    }
    let file = path.display().to_string();
    let mut reader = File::open(path).map_err(|source| JobFileError::Read { file: file.clone(), source })?;
    parse(&file, &bounded(&file, &mut reader)?)
}

/// Reads the jobs in `bytes`; `file` is its name in errors.
pub(crate) fn parse(file: &str, bytes: &[u8]) -> Result<Vec<Job>, JobFileError> {
    let content = |YamlError { message, mark }: YamlError| JobFileError::Content {
        file: file.to_owned(),
        mark,
        message,
    };
    let text = std::str::from_utf8(bytes).map_err(|error| content(not_text(bytes, error.valid_up_to())))?;
    let documents = yaml::parse(text).map_err(content)?;
    if documents.is_empty() {
        return Err(JobFileError::Empty { file: file.to_owned() });
    }
    let jobs: Vec<Job> = documents.iter().map(read_job).collect::<Result<_, _>>().map_err(content)?;
    refuse_twins(&documents, &jobs).map_err(content)?;
    Ok(jobs)
}

/// The byte that is not UTF-8, as line and column.
fn not_text(bytes: &[u8], at: usize) -> YamlError {
    let before = String::from_utf8_lossy(&bytes[..at]);
    let mark = Mark {
        line: before.matches('\n').count() + 1,
        column: before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1,
    };
    YamlError { mark: Some(mark), message: "not text: the file has to be in UTF-8".to_owned() }
}

fn bounded(file: &str, reader: &mut impl Read) -> Result<Vec<u8>, JobFileError> {
    let mut bytes = Vec::new();
    reader
        .take(FILE_LEN_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| JobFileError::Read { file: file.to_owned(), source })?;
    if bytes.len() as u64 > FILE_LEN_MAX {
        return Err(JobFileError::TooLarge { file: file.to_owned() });
    }
    Ok(bytes)
}

fn read_job(document: &Node) -> Result<Job, YamlError> {
    let job: Job = document.read()?;
    job.validate().map_err(|error| YamlError {
        mark: Some(document.mark_of(&error.field)),
        message: error.to_string(),
    })?;
    Ok(job)
}

/// The second of two jobs of one name would replace the first at once.
fn refuse_twins(documents: &[Node], jobs: &[Job]) -> Result<(), YamlError> {
    let mut seen = BTreeMap::new();
    for (document, job) in documents.iter().zip(jobs) {
        let mark = document.mark_of("job");
        if let Some(first) = seen.insert(&job.job, mark) {
            let message = format!("job `{}` is in this file twice: first in line {}", job.job, first.line);
            return Err(YamlError { mark: Some(mark), message });
        }
    }
    Ok(())
}

/// `file:line:column`, as compilers write it.
struct Place<'a> {
    file: &'a str,
    mark: Option<Mark>,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mark {
            Some(Mark { line, column }) => write!(f, "{}:{line}:{column}", self.file),
            None => f.write_str(self.file),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    const HELLO: &str =
        "job: hello\ngroups:\n  web:\n    count: 3\n    tasks:\n      server:\n        exec: [/bin/true]\n";

    fn error(text: &str) -> String {
        parse("hello.yaml", text.as_bytes()).expect_err("this is refused").to_string()
    }

    #[test]
    fn several_documents_are_several_jobs() {
        let text = format!("{HELLO}---\n{}", HELLO.replace("hello", "other"));
        let names: Vec<String> =
            parse("f", text.as_bytes()).unwrap().into_iter().map(|job| job.job).collect();
        assert_eq!(names, ["hello", "other"]);
    }

    #[test]
    fn one_bad_document_refuses_the_file() {
        let text = error(&format!("{HELLO}---\n{}", HELLO.replace("count", "cuont")));
        assert!(
            text.starts_with("hello.yaml:12:5: unknown field `cuont`, expected one of `count`, "),
            "{text}"
        );
        assert!(text.ends_with("; did you mean `count`?"), "{text}");
    }

    #[test]
    fn validation_errors_have_a_place_too() {
        let text = error(&HELLO.replace("count: 3", "count: 20000"));
        assert!(text.starts_with("hello.yaml:4:5: groups.web.count: 20000 is more than"), "{text}");
        let text = error(&HELLO.replace("/bin/true", "true"));
        assert!(text.starts_with("hello.yaml:7:9: groups.web.tasks.server.exec: "), "{text}");
    }

    #[test]
    fn a_job_may_be_in_a_file_once() {
        let text = error(&format!("{HELLO}---\n{HELLO}"));
        assert_eq!(text, "hello.yaml:9:1: job `hello` is in this file twice: first in line 1");
    }

    #[test]
    fn what_is_no_text_or_no_job_is_refused() {
        assert!(error("# nothing\n").contains("holds no job"));
        let latin = parse("f", b"a: b\nc: \xff").unwrap_err().to_string();
        assert!(latin.starts_with("f:2:4: not text"), "{latin}");
        assert_eq!(error("groups: {}\n"), "hello.yaml:1:1: field `job` is missing");
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let error = bounded("f", &mut io::repeat(b'a')).expect_err("it has no end");
        assert!(matches!(error, JobFileError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn the_examples_are_jobs() {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples"));
        let paths: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let yaml = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "yaml");
        let read: Vec<_> = paths.iter().filter(yaml).map(|path| (path, read(path))).collect();
        for (path, jobs) in &read {
            assert!(jobs.is_ok(), "{}: {}", path.display(), jobs.as_ref().unwrap_err());
        }
        assert!(read.len() >= 3, "{} examples", read.len());
    }
}
