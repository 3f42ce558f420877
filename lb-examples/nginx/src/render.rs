//! Endpoints to nginx's configuration: a pure function, so that the same pods are the same bytes.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use hextet_api::endpoints::Endpoint;

use crate::select::{Selector, is_name};

/// What stays the same while pods come and go.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) selector: Selector,
    pub(crate) port: u16,
    pub(crate) listen: Vec<Listen>,
}

/// Where nginx listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listen {
    /// None: every address of both families.
    address: Option<IpAddr>,
    port: u16,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        let (address, port) = match text.parse::<SocketAddr>() {
            Ok(addr) => (Some(addr.ip()), addr.port()),
            Err(_) => (None, text.parse().unwrap_or(0)),
        };
        match port {
            0 => Err(format!("`{text}` is not a place to listen: give 80, [::1]:80 or 192.0.2.1:80")),
            port => Ok(Listen { address, port }),
        }
    }
}

impl Listen {
    fn directives(self) -> String {
        let Listen { address, port } = self;
        match address {
            None => format!("    listen {port};\n    listen [::]:{port};\n"),
            Some(address) => format!("    listen {};\n", SocketAddr::new(address, port)),
        }
    }
}

/// The file to include in the http block: the ready endpoints, or a server that says that there are none.
pub(crate) fn render<'a>(frame: &Frame, ready: impl Iterator<Item = &'a Endpoint>) -> String {
    let ready: Vec<&Endpoint> = ready.collect();
    let mut text = format!("# Pods of {}. Written by lb-nginx, which will write it again.\n", frame.selector);
    if !ready.is_empty() {
        text.push_str(&upstream(frame, &ready));
    }
    text.push_str("server {\n");
    text.extend(frame.listen.iter().map(|listen| listen.directives()));
    match ready.is_empty() {
        true => text.push_str(&unavailable(frame)),
        false => text.push_str(&location(frame)),
    }
    text.push_str("}\n");
    text
}

fn upstream(frame: &Frame, ready: &[&Endpoint]) -> String {
    let name = frame.selector.upstream();
    // The zone makes the workers take turns together. A peer takes less than 1 KiB of it.
    let mut text = format!("upstream {name} {{\n    zone {name} {}k;\n", 64 + ready.len());
    for endpoint in ready {
        // Writing to a String does not fail.
        let _ = writeln!(text, "    server [{}]:{};{}", endpoint.address, frame.port, comment(endpoint));
    }
    text.push_str("    keepalive 32;\n}\n");
    text
}

/// Tells a reader which pod it is.
fn comment(endpoint: &Endpoint) -> String {
    match is_name(&endpoint.pod) && is_name(&endpoint.node) {
        true => format!(" # {} on {}", endpoint.pod, endpoint.node),
        // What is no name is not written into the configuration.
        false => String::new(),
    }
}

fn location(frame: &Frame) -> String {
    format!(
        "    location / {{
        proxy_pass http://{};
        proxy_http_version 1.1;
        proxy_set_header Connection \"\";
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_connect_timeout 2s;
    }}
",
        frame.selector.upstream()
    )
}

fn unavailable(frame: &Frame) -> String {
    format!(
        "    default_type text/plain;
    location / {{
        add_header Retry-After 1 always;
        return 503 \"no pod of {} is ready\\n\";
    }}
",
        frame.selector
    )
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use hextet_api::endpoints::EndpointState;

    use super::*;

    fn frame(listen: &[&str]) -> Frame {
        Frame {
            selector: "hello/web".parse().unwrap(),
            port: 8080,
            listen: listen.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    fn endpoint(pod: &str, last: u16) -> Endpoint {
        Endpoint {
            pod: pod.into(),
            group: "web".into(),
            node: "n1".into(),
            address: std::net::Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 1, 0, 0, 0, last),
            state: EndpointState::Ready,
        }
    }

    fn check(frame: &Frame, ready: &[Endpoint], expected: Expect) {
        expected.assert_eq(&render(frame, ready.iter()));
    }

    #[test]
    fn each_ready_pod_is_a_server() {
        check(
            &frame(&["80"]),
            &[endpoint("hello-web-aaaaa", 1), endpoint("hello-web-bbbbb", 2)],
            expect![[r#"
                # Pods of hello/web. Written by lb-nginx, which will write it again.
                upstream hextet_hello_web {
                    zone hextet_hello_web 66k;
                    server [fd12:3456:789a:1::1]:8080; # hello-web-aaaaa on n1
                    server [fd12:3456:789a:1::2]:8080; # hello-web-bbbbb on n1
                    keepalive 32;
                }
                server {
                    listen 80;
                    listen [::]:80;
                    location / {
                        proxy_pass http://hextet_hello_web;
                        proxy_http_version 1.1;
                        proxy_set_header Connection "";
                        proxy_set_header Host $http_host;
                        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
                        proxy_set_header X-Forwarded-Proto $scheme;
                        proxy_connect_timeout 2s;
                    }
                }
            "#]],
        );
    }

    #[test]
    fn without_pods_a_server_says_so() {
        check(
            &frame(&["[::1]:8081", "192.0.2.1:80"]),
            &[],
            expect![[r#"
                # Pods of hello/web. Written by lb-nginx, which will write it again.
                server {
                    listen [::1]:8081;
                    listen 192.0.2.1:80;
                    default_type text/plain;
                    location / {
                        add_header Retry-After 1 always;
                        return 503 "no pod of hello/web is ready\n";
                    }
                }
            "#]],
        );
    }

    #[test]
    fn what_is_no_name_is_not_written() {
        let text = render(&frame(&["80"]), [endpoint("x\n} evil {", 1)].iter());
        assert!(!text.contains("evil"), "{text}");
    }

    #[test]
    fn places_to_listen_are_read() {
        for good in ["80", "[::]:80", "192.0.2.1:8080"] {
            assert!(good.parse::<Listen>().is_ok(), "{good}");
        }
        for bad in ["", "0", "::1:80x", "host:80", "70000", "[::1]:0"] {
            assert!(bad.parse::<Listen>().is_err(), "{bad}");
        }
    }
}
