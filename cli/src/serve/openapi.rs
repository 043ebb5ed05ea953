//! GET /openapi.json, made from the table of routes and the table of fields.

use super::errors::ApiResult;
use super::fields;
use super::front::Front;
use super::generate::json_reply;
use super::routes::{BodyKind, Call, ROUTES, Route};
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// GET /openapi.json
pub async fn description(_: Arc<Front>, _: Call) -> ApiResult<Response> {
    Ok(json_reply(&document()))
}

fn operation(route: &Route, path: &str) -> Value {
    let mut parameters = Vec::new();
    if path.contains("{id}") {
        parameters.push(json!({
            "name": "id", "in": "path", "required": true,
            "schema": {"type": "integer", "minimum": 0},
        }));
    }
    if route.method == "POST" && path == "/slots/{id}" {
        parameters.push(json!({
            "name": "action", "in": "query", "required": true,
            "schema": {"enum": ["save", "restore", "erase"]},
        }));
    }
    if path == "/cors-proxy" {
        parameters.push(json!({
            "name": "url", "in": "query", "required": true,
            "schema": {"type": "string", "format": "uri"},
        }));
    }
    let mut out = json!({
        "summary": route.about,
        "operationId": format!("{}{}", route.method.to_lowercase(), path.replace(['/', '{', '}', '.'], "_")),
        "parameters": parameters,
        "responses": {
            "200": {"description": "done"},
            "default": {
                "description": "not done",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    });
    let schema = match route.body {
        BodyKind::Nothing => None,
        BodyKind::Json => Some(json!({})),
        BodyKind::Generation(own) => {
            let own: Map<String, Value> = own.iter().map(|n| (n.to_string(), json!({}))).collect();
            Some(json!({"allOf": [
                {"$ref": "#/components/schemas/Generation"},
                {"type": "object", "properties": own},
            ]}))
        }
    };
    if let Some(schema) = schema {
        out["requestBody"] = json!({"content": {"application/json": {"schema": schema}}});
    }
    if route.open {
        out["security"] = json!([]);
    }
    out
}

/// The description.
pub fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        for path in route.paths {
            let entry = paths.entry(*path).or_insert(json!({}));
            entry[route.method.to_lowercase()] = operation(route, path);
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "mneme",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "llama.cpp-compatible server with compressed long-context memory",
        },
        "paths": paths,
        "security": [{"bearer": []}, {}],
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Generation": {"type": "object", "properties": fields::schema()},
                "Error": {"type": "object", "properties": {"error": {
                    "type": "object",
                    "properties": {
                        "code": {"type": "integer"},
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                    },
                    "required": ["code", "message", "type"],
                }}},
            },
        },
    })
}
