-- trajectories.left_out  whose calls the words of `partial` are about; of the record's unknown fields, where
--                        parse_trajectories has put it
ALTER TABLE trajectories ADD COLUMN IF NOT EXISTS left_out Array(Tuple(reason String, agent String, resource String)) ALIAS JSONExtract(extra['left_out'], 'Array(Tuple(reason String, agent String, resource String))');
