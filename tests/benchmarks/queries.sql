-- name: get_item(key)^
SELECT id, name FROM item WHERE id = :key;

-- name: add_log(item, note)!
INSERT INTO log (item, note) VALUES (:item, :note);

-- name: count_hit(key)!
UPDATE item SET hits = hits + 1 WHERE id = :key;
